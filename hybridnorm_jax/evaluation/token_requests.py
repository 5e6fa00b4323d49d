"""What is scored, as tokens: continuations of contexts, and how those that are longer than a window are cut."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Tokens = Sequence[int]


class Request(NamedTuple):
    """Asks for the probability of a continuation.

    Attributes:
      context: what stands before it, at least one token.
      continuation: what is scored; none of it has probability 1.
    """

    context: Tokens
    continuation: Tokens


class Piece(NamedTuple):
    """A row that the model reads at once.

    Attributes:
      inputs: what it reads.
      targets: the tokens after the last len(targets) inputs.
    """

    inputs: Tokens
    targets: Tokens


def pieces(request: Request, *, window: int, stride: int | None = None) -> Iterator[Piece]:
    """Cut a request into rows of at most `window` inputs, in which every token of the continuation is a target once.

    A continuation of at most `window` tokens is one row: of a context that is too long its end is read. A longer one
    begins with a row of `window` targets, before which one token of the context is read. Each further row has `stride`
    targets, the last one what is left. It reads all that fits before them, at least window - stride tokens.

    Args:
      request: its context is not empty.
      window: the most tokens that the model reads.
      stride: at most `window`, which is the default.
    """
    stride = window if stride is None else stride
    context, continuation = list(request.context), list(request.continuation)
    tokens, end = context + continuation, len(context)
    # Taken from the whole, so that what is cut off in front moves no boundary.
    while end < len(tokens):
        length = window if end == len(context) else stride
        start, end = end, min(end + length, len(tokens))
        yield Piece(inputs=tokens[max(end - 1 - window, 0) : end - 1], targets=tokens[start:end])
