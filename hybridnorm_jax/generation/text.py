"""Text that goes on from prompts, where generate() goes on from tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.generation.generate import Tokens, generate
from hybridnorm_jax.generation.prompts import Documents, Prompts
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.generation.streaming import TextStream
from hybridnorm_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
      text: up to the stop string, or to the end of the document.
      tokens: those of the text, and what the model wrote after it before it was stopped.
      ended: "stop" (a stop string), "document" (the separator, or another token that ends an answer) or "length" (as
        many tokens as were asked for).
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
    written_down: Prompts | None = None,
) -> list[Written]:
    """Go on from each prompt to the end of its document, to a stop string, or for max_new_tokens.

    Args:
      params, max_new_tokens, sampling, seeds: see generate.
      tokenizer: the model's.
      prompts: what the texts go on from.
      stop: see TextStream.
      on_text: is called with the new text of every prompt, as soon as it is certain.
      written_down: what is made of the prompts; by default each begins a document, behind the separator.

    Raises:
      UserError: see generate; or a prompt has no token.
    """
    written_down = Documents(tokenizer) if written_down is None else written_down
    rows = [written_down.tokens(prompt) for prompt in prompts]
    streams = [TextStream(tokenizer, (*stop, *written_down.stop), after=row) for row in rows]
    texts = ["" for _ in prompts]
    ends = written_down.end_ids

    def tell(new: list[str]) -> None:
        for number, text in enumerate(new):
            texts[number] += text
        if on_text is not None and any(new):
            on_text(new)

    def read(tokens: list[Tokens]) -> bool:
        tell([stream.push(new) for stream, new in zip(streams, tokens, strict=True)])
        for number, new in enumerate(tokens):
            has_ended[number] |= streams[number].has_stopped or bool(np.isin(new, ends).any())
        return all(has_ended)

    has_ended = [False for _ in prompts]
    written = generate(
        config,
        params,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=ends,
        seeds=seeds,
        on_tokens=read,
    )
    tell([stream.finish() for stream in streams])
    ended = [_end(stream, tokens, ends) for stream, tokens in zip(streams, written, strict=True)]
    return [Written(*each) for each in zip(texts, written, ended, strict=True)]


def _end(stream: TextStream, tokens: Tokens, ends: Sequence[int]) -> str:
    if stream.has_stopped:
        return "stop"
    return "document" if len(tokens) and tokens[-1] in ends else "length"
