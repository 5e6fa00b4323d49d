"""The pages of this project, taken apart: fenced blocks, commands, links, headings. For the tests beside this file.

Commands stand in `bash` blocks, one in a line (a trailing backslash joins lines), and their output in `text` blocks. A
Python or YAML block whose first line is `# NAME.py` or `# NAME.yaml` shows a file of that name.
"""

import dataclasses
import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
)


def name(page: Path) -> str:
    """Its path in the repository, for the names of tests."""
    return page.relative_to(REPOSITORY).as_posix()


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      page, line: where its first line of text stands.
      language: what its fence says.
      text: without the fences.
      shown: the `text` block that follows at once, the output; None where there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    shown: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that this block shows."""
        named = re.match(r"# ([\w.-]+\.(?:py|yaml))$", self.text.partition("\n")[0])
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, first to last."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    result = []
    for number, match in enumerate(found):
        following = found[number + 1] if number + 1 < len(found) else None
        shown = None
        if following is not None and following[1] == "text" and not text[match.end() : following.start()].strip():
            shown = following[2]
        line = text.count("\n", 0, match.start()) + 2
        result.append(Block(page=page, line=line, language=match[1], text=match[2], shown=shown))
    return result


@dataclasses.dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
      block: where it stands.
      words: as a shell would split it, without variables in front and comments behind.
      shown: its output, where it is the last command of its block.
    """

    block: Block
    words: tuple[str, ...]
    shown: str | None

    def __str__(self) -> str:
        return f"{self.block}:{' '.join(self.words)[:60]}"


def commands(page: Path) -> list[Command]:
    """All commands of a page, first to last."""
    result = []
    for block in blocks(page):
        if block.language != "bash":
            continue
        lines = [split for line in block.text.replace("\\\n", " ").splitlines() if (split := _words(line))]
        for number, words in enumerate(lines):
            shown = block.shown if number + 1 == len(lines) else None
            result.append(Command(block=block, words=words, shown=shown))
    return result


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return tuple(words)


def prose(page: Path) -> str:
    """The text of a page without its fenced and its indented blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"^ {4}\S.*$", "", text, flags=re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    """Everything between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """The targets of links and pictures, in Markdown and in HTML."""
    text = prose(page)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MkDocs both make them, and those that elements of HTML state."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    stated = set(re.findall(r"<\w[^>]* id=\"([^\"]+)\"", text))
    return {heading.strip().replace(" ", "-") for heading in plain} | stated
