"""YAML as nested lists and maps of texts, before anything is known of their types.

PyYAML's parser tells the structure. What a text means is left to the type of its key (key_values.py): YAML 1.1 would
make 8 of 010, 90 of 1:30 and false of no. Anchors, aliases, merges and tags, which nobody needs in a flat list of keys,
are refused: a few lines of them can stand for gigabytes, or for code.
"""

from typing import NamedTuple

import yaml
from yaml import events

from hybridnorm_jax.config_fields import NULLS
from hybridnorm_jax.errors import ConfigError, first_line

MOST_CHARACTERS = 1_000_000
# A configuration needs four levels.
DEEPEST = 20
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Scalar(NamedTuple):
    """A text in YAML; `plain` is one without quotes, which alone can stand for a number, true, false or null."""

    text: str
    plain: bool

    @property
    def is_null(self) -> bool:
        """Whether this is YAML's null."""
        return self.plain and self.text in NULLS


Node = Scalar | list["Node"] | dict[str, "Node"]


def read_yaml(text: str, origin: str, *, lines: bool = True) -> Node:
    """The one document of a YAML text; an empty one is null.

    Args:
      origin: what it came from, for errors.
      lines: whether errors name the line.

    Raises:
      ConfigError: the text is not YAML, too long, nested too deeply, or uses more of YAML than said above.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{origin}: {len(text):,} characters; a configuration has at most {MOST_CHARACTERS:,}")
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=LOADER):
            builder.take(event)
    except _RefusedError as error:
        raise ConfigError(f"{_where(origin, error.line, lines)}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = None if mark is None else mark.line
        is_list = mark is not None and text[mark.index : mark.index + 1] == "@"
        right = '; a value that begins with @ needs quotes, such as "@list.txt"' if is_list else ""
        raise ConfigError(f"{_where(origin, line, lines)}: not valid YAML: {error.problem}{right}") from error
    except (yaml.YAMLError, UnicodeError) as error:  # a character that YAML does not allow, or bytes that are no UTF-8
        raise ConfigError(f"{origin}: not valid YAML: {first_line(error)}") from error
    return Scalar("", plain=True) if builder.document is None else builder.document


def _where(origin: str, line: int | None, lines: bool) -> str:
    return f"{origin}, line {line + 1}" if lines and line is not None else origin


class _RefusedError(Exception):
    """What YAML has and a configuration must not have."""

    def __init__(self, event: yaml.Event, reason: str):
        super().__init__(reason)
        self.line = event.start_mark.line


class _Builder:
    """Makes nodes of PyYAML's events, without recursion: no input is too deep for Python's stack."""

    def __init__(self) -> None:
        self.document: Node | None = None
        self._open: list[list[Node] | dict[str, Node]] = []
        # Of each open map: the key whose value comes next. Of each open list: None.
        self._keys: list[str | None] = []

    def take(self, event: yaml.Event) -> None:
        """Take the next event."""
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError(event, "anchors and aliases (& and *) are not read; write the value itself")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(event, f"tags ({event.tag}) are not read; the key says which type its value has")
        match event:
            case events.ScalarEvent():
                self._scalar(event)
            case events.SequenceStartEvent():
                self._start(event, [])
            case events.MappingStartEvent():
                self._start(event, {})
            case events.SequenceEndEvent() | events.MappingEndEvent():
                self._open.pop()
                self._keys.pop()
            case events.DocumentStartEvent() if self.document is not None:
                raise _RefusedError(event, "holds a second YAML document; a configuration is one")

    def _scalar(self, event: yaml.Event) -> None:
        is_key = bool(self._open) and isinstance(self._open[-1], dict) and self._keys[-1] is None
        if not is_key:
            self._put(event, Scalar(event.value, plain=event.style in (None, "")))
            return
        if event.value == "<<" and event.style in (None, ""):
            raise _RefusedError(event, "merges (<<) are not read; write the keys themselves")
        if event.value in self._open[-1]:
            raise _RefusedError(event, f"not valid YAML: found duplicate key {event.value}")
        self._keys[-1] = event.value

    def _start(self, event: yaml.Event, collection: list[Node] | dict[str, Node]) -> None:
        if len(self._open) == DEEPEST:
            raise _RefusedError(event, f"nested more than {DEEPEST} deep")
        self._put(event, collection)
        self._open.append(collection)
        self._keys.append(None)

    def _put(self, event: yaml.Event, node: Node) -> None:
        if not self._open:
            self.document = node
            return
        inside = self._open[-1]
        if isinstance(inside, list):
            inside.append(node)
        elif self._keys[-1] is None:
            raise _RefusedError(event, "a key must be a text")
        else:
            inside[self._keys[-1]] = node
            self._keys[-1] = None
