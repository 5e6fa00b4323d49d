"""From texts to what is scored, and from what a model writes to an answer, as in the harness's `hf` model.

The boundary between a context and its continuation is that of the tokens of both together. Whitespace at the end of a
context belongs to the continuation: most tokenizers join a word with the space before it.
"""

from collections.abc import Sequence

import numpy as np

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.evaluation.token_requests import Request


def continuations(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, separator: int | None) -> list[Request]:
    """The requests of (context, continuation) pairs; an empty context is the separator, with which documents begin.

    Args:
      pairs: texts.
      separator: may be None where no context is empty.
    """
    moved = [_with_space_moved(context, continuation) for context, continuation in pairs]
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    requests = []
    for (context, continuation), begin, whole in zip(moved, contexts, wholes, strict=True):
        if not context:
            requests.append(beginning(whole, separator))
            continue
        rest = whole[len(begin) :]
        if continuation and not len(rest):  # all of it was joined with the end of the context
            rest = tokenizer.encode(continuation)
        requests.append(Request(begin.tolist(), rest.tolist()))
    return requests


def documents(tokenizer: Tokenizer, texts: Sequence[str], *, separator: int) -> list[Request]:
    """The requests of whole texts, each after the separator."""
    return [beginning(tokens, separator) for tokens in tokenizer.encode_batch(texts)]


def beginning(tokens: np.ndarray, separator: int) -> Request:
    """Tokens as the beginning of a document: the separator stands before them once, also where they begin with it."""
    tokens = tokens.tolist()
    if tokens[:1] == [separator]:
        return Request(tokens[:1], tokens[1:])
    return Request([separator], tokens)


def before_first(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop strings; empty stop strings stop nothing.

    Where two of them overlap in the text, the one that is named first decides, as in the harness.
    """
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text


def _with_space_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
