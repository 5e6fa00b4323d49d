"""What stands in a stranger's file, as the one line of a message can show it."""

LONGEST = 120


def shown(name: str) -> str:
    """A key's or a tensor's name: itself, quoted where it holds line breaks or other controls, cut where it is long."""
    short = name if len(name) <= LONGEST else name[:LONGEST] + "..."
    return short if short.isprintable() else repr(short)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
