"""Text that goes on from prompts, where generate() goes on from tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.generate import Tokens, generate
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.generation.streaming import TextStream
from hybridnorm_jax.model.config import ModelConfig

# What is wrong with a prompt without a token, by whether documents come behind a separator.
NO_TOKEN = {
    True: "it has no token, and the tokenizer has no separator to begin with; give more text",
    False: "it has no token, and this model has learned documents without a separator before them; give more text",
}


@dataclasses.dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
      text: up to the stop string, or to the end of the document.
      tokens: those of the text, and what the model wrote after it before it was stopped.
      ended: "stop" (a stop string), "document" (the separator) or "length" (as many tokens as were asked for).
    """

    text: str
    tokens: Tokens
    ended: str


def write_text(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seeds: int | Sequence[int] = 0,
    on_text: Callable[[list[str]], None] | None = None,
    follows_separator: bool = True,
) -> list[Written]:
    """Go on from each prompt to the end of its document, to a stop string, or for max_new_tokens.

    Args:
      params, max_new_tokens, sampling, seeds: see generate.
      tokenizer: the model's.
      prompts: each begins a document.
      stop: see TextStream.
      on_text: is called with the new text of every prompt, as soon as it is certain.
      follows_separator: whether the separator stands before a prompt, as DataSection says of the model's data.

    Raises:
      UserError: see generate; or a prompt has no token.
    """
    rows = [document_of(prompt, tokenizer, follows_separator=follows_separator) for prompt in prompts]
    streams = [TextStream(tokenizer, stop, after=row) for row in rows]
    texts = ["" for _ in prompts]
    separators = [] if tokenizer.separator_id is None else [tokenizer.separator_id]

    def tell(new: list[str]) -> None:
        for number, text in enumerate(new):
            texts[number] += text
        if on_text is not None and any(new):
            on_text(new)

    def read(tokens: list[Tokens]) -> bool:
        tell([stream.push(new) for stream, new in zip(streams, tokens, strict=True)])
        for number, new in enumerate(tokens):
            has_ended[number] |= streams[number].has_stopped or bool(np.isin(new, separators).any())
        return all(has_ended)

    has_ended = [False for _ in prompts]
    written = generate(
        config,
        params,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=separators,
        seeds=seeds,
        on_tokens=read,
    )
    tell([stream.finish() for stream in streams])
    ends = [_end(stream, tokens, separators) for stream, tokens in zip(streams, written, strict=True)]
    return [Written(*each) for each in zip(texts, written, ends, strict=True)]


def _end(stream: TextStream, tokens: Tokens, separators: Sequence[int]) -> str:
    if stream.has_stopped:
        return "stop"
    return "document" if len(tokens) and tokens[-1] in separators else "length"


def document_of(prompt: str, tokenizer: Tokenizer, *, follows_separator: bool) -> Int[np.ndarray, " tokens"]:
    """The tokens of a prompt that begins a document: behind the separator or not, see DataSection.follows_separator.

    Raises:
      UserError: there is no token.
    """
    ids = begin_document(tokenizer.encode(prompt), tokenizer, follows_separator=follows_separator)
    if not len(ids):
        raise UserError(f"the prompt {prompt!r}: {NO_TOKEN[follows_separator]}")
    return ids


def begin_document(
    ids: Int[np.ndarray, " tokens"], tokenizer: Tokenizer, *, follows_separator: bool
) -> Int[np.ndarray, " prompt"]:
    """The separator, where there is one and it stands before documents, and the ids."""
    begin = [] if tokenizer.separator_id is None or not follows_separator else [tokenizer.separator_id]
    return np.concatenate([np.array(begin, np.int32), np.asarray(ids, np.int32)])
