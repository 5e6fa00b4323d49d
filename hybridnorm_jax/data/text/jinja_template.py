"""A chat template in Jinja, as Hugging Face's tokenizers have them, in Jinja's sandbox.

What would make two renderings of one conversation differ is left out: the date, and chance.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybridnorm_jax.data.text.answers import ASSISTANT, Message, Part
from hybridnorm_jax.errors import DataError, first_line

# Characters for private use: none of a conversation's own can be taken for a place where a content belongs.
_OPEN, _CLOSE = "\ue000", "\ue001"
# What a template can fail with, besides Jinja's own errors.
_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _Generation(ext.Extension):
    """`{% generation %}` around an answer, which some templates have: here only what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's name for it

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        """What stands in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate:
    """A template in Jinja: see answers.Template."""

    ends = ()

    def __init__(self, source: str, tokens: dict[str, str], what: str):
        """Compile it.

        Args:
          source: of the template.
          tokens: bos_token and eos_token.
          what: names it in messages.

        Raises:
          DataError: it is no Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation]
        )
        del environment.filters["random"], environment.globals["lipsum"]
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{what}: not a Jinja template (line {error.lineno}: {first_line(error)})") from error
        self._tokens = tokens
        self._what = what
        self.fingerprint = hashlib.sha256(json.dumps([source, tokens]).encode()).hexdigest()

    def parts(self, messages: Sequence[Message], place: str, *, asks: bool = False) -> list[Part]:
        """See answers.Template.

        Where each content stands is found by a second rendering, with marks in their place. A template may strip white
        space from contents. One that changes them otherwise is refused: nobody knows what of it is an answer.

        Raises:
          DataError: the template refuses the conversation, or changes or leaves out a content.
        """
        marks = [f"{_OPEN}{number}{_CLOSE}" for number in range(len(messages))]
        of_marks = [Message(each.role, mark) for each, mark in zip(messages, marks, strict=True)]
        marked = self._render(of_marks, place, asks)
        rendered = self._render(messages, place, asks)
        for stripped in (False, True):
            contents = [each.content.strip() if stripped else each.content for each in messages]
            parts = _between(marked, marks, messages, contents)
            if parts is not None and "".join(part.text for part in parts) == rendered:
                return [part for part in parts if part.text]
        right = "use a template that only adds to it"
        raise DataError(f"{place}: {self._what} changes or leaves out what is said; {right}")

    def _render(self, messages: Sequence[Message], place: str, asks: bool) -> str:
        dictionaries = [message._asdict() for message in messages]
        try:
            return self._template.render(messages=dictionaries, add_generation_prompt=asks, **self._tokens)
        except _ERRORS as error:
            raise DataError(f"{place}: {self._what} refuses the conversation: {first_line(error)}") from error


def _between(
    marked: str, marks: Sequence[str], messages: Sequence[Message], contents: Sequence[str]
) -> list[Part] | None:
    """The parts of a text in which marks stand for contents; None where it has not each mark once, in their order."""
    parts, rest, follows_answer = [], marked, False
    for mark, message, content in zip(marks, messages, contents, strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        says = message.role == ASSISTANT
        parts += [Part(before, is_markup=True, ends_answer=follows_answer), Part(content, is_target=says)]
        follows_answer = says
    parts.append(Part(rest, is_markup=True, ends_answer=follows_answer))
    return None if any(_OPEN in part.text for part in parts if part.is_markup) else parts


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    """As the documentation of transformers has it: characters stand for themselves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
