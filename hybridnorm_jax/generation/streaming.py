"""Tokens that come a few at a time as text that can be shown at once, up to a stop string."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import UserError

# What decoders give for the bytes of a character that is not whole: one, or one for each byte. Some give it for all
# bytes that stand together until the last character of them is whole.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes.
MOST_BYTES = 4
# So many tokens before a token decide its text, such as whether it begins with a space; and no more are kept than this.
CONTEXT, MOST_KEPT = 16, 256


class TextStream:
    """The text of tokens, piece by piece; no piece ends in half a character or holds any of a stop string.

    Bytes that are no character become U+FFFD once it is certain that they are none.

        stream = TextStream(tokenizer, after=prompt, stop=["\\n\\n"])
        print(stream.feed(tokens), end="")
        print(stream.finish(), end="")

    The pieces together are the same however the tokens are divided: the text before the stop string that is complete
    first (of two that end together, the one that begins first), or all of it where none is ever complete.

    Attributes:
      is_stopped: whether a stop string has come; what is fed after it is not looked at.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, after: Sequence[int] | Int[np.ndarray, " tokens"] = (), stop: Sequence[str] = ()
    ):
        """Begin a text.

        Args:
          after: the tokens that it goes on from.
          stop: texts that end it.

        Raises:
          UserError: a stop string is empty.
        """
        if "" in stop:
            raise UserError("stop: a stop string must not be empty")
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = [int(token) for token in after][-CONTEXT:]
        self._length = len(tokenizer.decode(self._tokens))  # of the text of _tokens that is no longer looked at
        self._held = ""  # may become a stop string

    def feed(self, tokens: Sequence[int] | Int[np.ndarray, " tokens"]) -> str:
        """The text that is certain by now and has not been returned before."""
        if self.is_stopped:
            return ""
        self._tokens += [int(token) for token in tokens]
        text = self._tokenizer.decode(self._tokens)
        complete = text.rstrip(INCOMPLETE)
        new = complete[self._length :]
        self._length = max(self._length, len(complete))
        if complete == text:
            self._forget()
        return self._before_stop(new)

    def finish(self) -> str:
        """The rest: what might have become a stop string, and U+FFFD for the bytes of half a character."""
        if self.is_stopped:
            return ""
        rest = self._before_stop(self._tokenizer.decode(self._tokens)[self._length :])
        rest, self._held, self._tokens = rest + self._held, "", []
        self._length = 0
        return rest

    def _forget(self) -> None:
        """Drop old tokens, so that a long text is not decoded over and over."""
        if len(self._tokens) <= MOST_KEPT:
            return
        # Not within a character.
        for length in range(CONTEXT, CONTEXT + MOST_BYTES):
            text = self._tokenizer.decode(self._tokens[-length:])
            if not text.startswith(INCOMPLETE):
                self._tokens, self._length = self._tokens[-length:], len(text)
                return

    def _before_stop(self, new: str) -> str:
        """What can be shown of the text that was held back and of what follows it."""
        text = self._held + new
        places = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            _, place = min(places)
            return text[:place]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        held = next((k for k in range(min(longest, len(text)), 0, -1) if self._may_become_stop(text[-k:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_become_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop)


def without_controls(text: str) -> str:
    """Text that moves no cursor and changes no color: other control characters than newline and tab are U+FFFD."""
    return "".join(each if each.isprintable() or each in "\n\t" else INCOMPLETE for each in text)
