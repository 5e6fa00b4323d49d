"""Records of which only a part is to be learned: a prompt and its completion, or the messages of a conversation.

A record becomes parts. What the model is to say, and what ends it, is a target; everything else is read only.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from hybridnorm_jax.data.text.deep_json import kind_of
from hybridnorm_jax.data.text.record_rows import shown_names
from hybridnorm_jax.errors import DataError

PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"
ASSISTANT = "assistant"
# Tokenizing takes more than 100 bytes of memory for each.
MOST_CHARACTERS = 4 << 20
# A role stands in the markup: it must not be able to spell out a special token.
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class Part(NamedTuple):
    """A stretch of a record's text.

    Attributes:
      text: as it is tokenized.
      is_target: whether its tokens are learned.
      is_markup: whether it comes from a template: only there a special token that is spelled out is one.
      ends_answer: whether it is the markup behind what the model says. The special token that it begins with, after
        white space, is learned too.
    """

    text: str
    is_target: bool = False
    is_markup: bool = False
    ends_answer: bool = False


class Message(NamedTuple):
    """What somebody says: "system", "user", "assistant" or another role."""

    role: str
    content: str


class Template(Protocol):
    """How a conversation is written down as one text.

    Attributes:
      fingerprint: changes when the text of a conversation may change.
      ends: the strings, besides special tokens, that end an answer.
    """

    fingerprint: str
    ends: tuple[str, ...]

    def parts(self, messages: Sequence[Message], place: str, *, asks: bool = False) -> list[Part]:
        """The text of a conversation, which `place` names in messages; `asks`: up to where the next answer begins."""


class Chatml:
    """ChatML: for each message <|im_start|>ROLE, a new line, the content, <|im_end|> and a new line."""

    fingerprint = "chatml"
    ends = ("<|im_end|>",)

    def parts(self, messages: Sequence[Message], place: str, *, asks: bool = False) -> list[Part]:
        """See Template. What ends an answer is learned, whether or not it is one token."""
        found = []
        for role, content in messages:
            says = role == ASSISTANT
            found += [
                Part(f"<|im_start|>{role}\n", is_markup=True),
                Part(content, is_target=says),
                Part("<|im_end|>", is_target=says, is_markup=True),
                Part("\n", is_markup=True),
            ]
        return [*found, Part(f"<|im_start|>{ASSISTANT}\n", is_markup=True)] if asks else found


@dataclasses.dataclass(frozen=True)
class AnswerRecords:
    """How such records are read: as conversations written down with a template, or as prompts where there is none."""

    template: Template | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Of a record that are needed."""
        return (PROMPT, COMPLETION) if self.template is None else (MESSAGES,)

    @property
    def fingerprint(self) -> str:
        """Changes when the parts of a record may change."""
        return PROMPT if self.template is None else f"{MESSAGES} {self.template.fingerprint}"

    def parts(self, record: Mapping[str, object], place: str) -> list[Part]:
        """The parts of one record.

        Raises:
          DataError: it is no such record, the template refuses it, or it is too long; the message names `place`.
        """
        if self.template is None:
            parts = prompt_parts(record, place)
        else:
            parts = self.template.parts(messages_of(record, place), place)
        if sum(len(part.text) for part in parts) > MOST_CHARACTERS:
            right = "such records are tokenized at once; make them shorter"
            raise DataError(f"{place}: more than {MOST_CHARACTERS >> 20} Mi characters; {right}")
        return parts


def prompt_parts(record: Mapping[str, object], place: str) -> list[Part]:
    """The parts of {"prompt": ..., "completion": ...}: the completion is learned.

    Raises:
      DataError: a field is missing or holds no text, or both are empty.
    """
    prompt, completion = (_text(record, field, place) for field in (PROMPT, COMPLETION))
    if not prompt and not completion:
        raise DataError(f"{place}: {PROMPT} and {COMPLETION} are both empty; remove the record")
    return [Part(prompt), Part(completion, is_target=True)]


def messages_of(record: Mapping[str, object], place: str) -> list[Message]:
    """The messages of {"messages": [{"role": ..., "content": ...}, ...]}.

    Raises:
      DataError: it is none, or nobody says anything that is to be learned.
    """
    if MESSAGES not in record:
        raise DataError(
            f"{place}: the record has no field {MESSAGES!r} (data.records=messages); it has: {shown_names(record)}"
        )
    content = record[MESSAGES]
    if not isinstance(content, list) or not content:
        shown = "an empty list" if content == [] else kind_of(content)
        raise DataError(f"{place}: {MESSAGES!r} must hold a list of messages, not {shown}")
    messages = [_message(each, f"{place}: message {number}") for number, each in enumerate(content, start=1)]
    if all(message.role != ASSISTANT for message in messages):
        raise DataError(
            f"{place}: no message has the role {ASSISTANT!r}, so there is nothing to learn; remove the record"
        )
    return messages


def _message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: is {kind_of(message)}, but must be an object with 'role' and 'content'")
    role, content = _text(message, "role", place), _text(message, "content", place)
    if not _ROLE.fullmatch(role):
        raise DataError(f"{place}: role {role[:80]!r} is no name, such as 'user' or {ASSISTANT!r}")
    return Message(role, content)


def _text(record: Mapping[str, object], field: str, place: str) -> str:
    if field not in record:
        raise DataError(f"{place}: has no field {field!r}; it has: {shown_names(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} must hold a string, not {kind_of(text)}")
    return text
