"""Tokens that become text piece by piece: no half characters, and nothing from a stop string on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import UserError

# What a tokenizer makes of bytes that are no whole character: more bytes may complete it.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# More tokens before a text do not decide how it begins.
CONTEXT = 16


class TextStream:
    """The text of tokens that come one after another.

        stream = TextStream(tokenizer, after=prompt, stop=["\\n\\n"])
        text = stream.push(tokens) + stream.push(more) + stream.finish()

    All that it returns, joined, is the text of all tokens up to the stop string that is the first to be complete,
    however the tokens were divided. Of several that end together it is the longest.

    Attributes:
      has_stopped: whether a stop string was found; what comes after it is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        after: Sequence[int] | Int[np.ndarray, " tokens"] = (),
    ):
        """Begin a text.

        Args:
          stop: the text ends before the first of these strings, which may lie across tokens.
          after: the tokens that it goes on from. Some tokenizers leave out the space before the first word of a text.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError("stop: an empty string would end every text at once; name the text to stop at")
        self.has_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = _newest(tokenizer, [int(token) for token in after[-CONTEXT:]])
        # How many of these ids came before the last whole character, and how many of their characters are known.
        self._context, self._known = len(self._ids), len(tokenizer.decode(self._ids))
        self._waiting = ""

    def push(self, tokens: Sequence[int] | Int[np.ndarray, " tokens"]) -> str:
        """The text that is certain now and was not before."""
        if not len(tokens):
            return ""
        self._ids.extend(int(token) for token in tokens)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(INCOMPLETE)
        new = whole[self._known :]
        self._known = max(self._known, len(whole))
        if len(whole) == len(text):
            self._forget()
        return self._before_stop(new, is_last=False)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._tokenizer.decode(self._ids)[self._known :]
        self._ids, self._context, self._known = [], 0, 0
        return self._before_stop(rest, is_last=True)

    def _forget(self) -> None:
        """Keep the newest ids as context: some tokenizers write a token in another way where a text begins."""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._known = len(self._tokenizer.decode(self._ids))

    def _before_stop(self, new: str, *, is_last: bool) -> str:
        if self.has_stopped:
            return ""
        text = self._waiting + new
        # (end, start) of each stop string.
        places = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if places:
            self.has_stopped, self._waiting = True, ""
            _, start = min(places)
            return text[:start]
        waits = 0 if is_last else max((_begun(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - waits :]
        return text[: len(text) - waits]


def _newest(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """These ids from the beginning of a character on, which has at most 4 bytes.

    Decoders with byte fallback make U+FFFD of all bytes that follow half a character.
    """
    begins = (ids[skipped:] for skipped in range(4))
    return next((each for each in begins if not tokenizer.decode(each).startswith(INCOMPLETE)), ids)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
