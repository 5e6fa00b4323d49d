"""How a prompt becomes tokens, and what ends the text behind it: a document goes on, or a question is answered."""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.data.text.answers import Message, Template
from hybridnorm_jax.data.tokens.answer_tokens import encode_records
from hybridnorm_jax.errors import UserError

# What is wrong with a prompt without a token, by whether documents come behind a separator.
NO_TOKEN = {
    True: "it has no token, and the tokenizer has no separator to begin with; give more text",
    False: "it has no token, and this model has learned documents without a separator before them; give more text",
}


class Prompts(Protocol):
    """What is made of prompts.

    Attributes:
      end_ids: the tokens that end a text.
      stop: the strings that end a text.
    """

    end_ids: tuple[int, ...]
    stop: tuple[str, ...]

    def tokens(self, prompt: str) -> Int[np.ndarray, " tokens"]:
        """The tokens of a prompt.

        Raises:
          UserError: there is none.
        """


class Documents:
    """A prompt begins a document, which ends with the separator."""

    stop = ()

    def __init__(self, tokenizer: Tokenizer, *, follows_separator: bool = True):
        """`follows_separator`: whether the separator stands before a document, as DataSection says of the data."""
        self._tokenizer, self._follows_separator = tokenizer, follows_separator
        self.end_ids = () if tokenizer.separator_id is None else (tokenizer.separator_id,)

    def tokens(self, prompt: str) -> Int[np.ndarray, " tokens"]:
        """See Prompts."""
        ids = self.begun(self._tokenizer.encode(prompt))
        if not len(ids):
            raise UserError(f"the prompt {prompt!r}: {NO_TOKEN[self._follows_separator]}")
        return ids

    def begun(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " prompt"]:
        """The separator, where there is one and it stands before documents, and the ids."""
        begin = self.end_ids if self._follows_separator else ()
        return np.concatenate([np.array(begin, np.int32), np.asarray(ids, np.int32)])


@dataclasses.dataclass(frozen=True)
class Questions:
    """A prompt is what a user says, and the text is the answer of the assistant.

    Attributes:
      template: how that is written down.
      follows_separator: as of Documents.
    """

    tokenizer: Tokenizer
    template: Template
    follows_separator: bool

    @property
    def stop(self) -> tuple[str, ...]:
        """See Prompts."""
        return self.template.ends

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The separator and all special tokens: an answer has none."""
        return (*Documents(self.tokenizer).end_ids, *self.tokenizer.special_tokens.values())

    def tokens(self, prompt: str) -> Int[np.ndarray, " tokens"]:
        """See Prompts."""
        parts = self.template.parts([Message("user", prompt)], f"the prompt {prompt!r}", asks=True)
        ((ids, _, _),) = encode_records(self.tokenizer, [parts])
        return Documents(self.tokenizer, follows_separator=self.follows_separator).begun(ids)
