"""Numbers as the tables, figures and sentences of a report show them."""

# A cell without a number.
NONE = "\N{EM DASH}"


def rate_text(rate: float) -> str:
    """A learning rate as it was written: 0.0003, not 3e-04; 3e-05 below 0.0001."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def loss_text(loss: float | None) -> str:
    """A loss, or the deviation of losses, in nats per token."""
    return NONE if loss is None else f"{loss:.4f}"


def signed_text(difference: float) -> str:
    """A difference of losses, always with its sign."""
    # A true minus sign is as wide as a plus, so that columns align.
    return f"{difference:+.4f}".replace("-", "\N{MINUS SIGN}")


def percent_text(percent: float | None) -> str:
    """A percentage."""
    return NONE if percent is None else f"{percent:.2f} %"


def digits_text(value: float | None) -> str:
    """Three digits, or all of those before the decimal point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def duration_text(seconds: float | None) -> str:
    """A time in seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
