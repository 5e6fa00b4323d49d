"""Draws tokens from a model, each after the window of tokens before it."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder

# Below 1, so that unlikely tokens are rarer than the model says; well above 0, at which small models repeat themselves.
TEMPERATURE = 0.8


def generate(
    config: ModelConfig,
    params: Any,
    prompt: Int[np.ndarray, "prompt"],
    *,
    num_tokens: int,
    window: int,
    key: Key[Array, ""],
    temperature: float = TEMPERATURE,
) -> Int[np.ndarray, "num_tokens"]:
    """Draw num_tokens from softmax(logits / temperature), each after at most the `window` tokens before it.

    Every token costs a forward pass over the whole window. That is enough for a look at a model, not for a server.

    Args:
      prompt: at least one token; its last `window` tokens are read.
      temperature: above 0.
    """
    # The window is padded behind the tokens, where a causal model does not look. Plain attention takes any length. XLA
    # cannot split a Pallas kernel over the devices on which the parameters may lie.
    model = Decoder(dataclasses.replace(config, attention="xla", expert_dispatch="blocked"))
    known = np.asarray(prompt, np.int32)[-window:]
    tokens = np.zeros((1, window), np.int32)
    tokens[0, : len(known)] = known
    filled = _Window(tokens=jnp.asarray(tokens), length=jnp.asarray(len(known), jnp.int32))
    return np.asarray(_draw(model, params, filled, jax.random.split(key, num_tokens), temperature))


class _Window(NamedTuple):
    """The tokens that the model reads; those from `length` on are padding."""

    tokens: Int[Array, "1 window"]
    length: Int[Array, ""]

    def append(self, token: Int[Array, ""]) -> "_Window":
        """The window with one more token; a full one loses its first."""
        size = self.tokens.shape[1]
        is_full = self.length == size
        tokens = jnp.where(is_full, jnp.roll(self.tokens, -1, axis=1), self.tokens)
        place = jnp.where(is_full, size - 1, self.length)
        return _Window(tokens=tokens.at[0, place].set(token), length=jnp.minimum(self.length + 1, size))


@partial(jax.jit, static_argnames="model")
def _draw(
    model: Decoder,
    params: Any,
    window: _Window,
    keys: Key[Array, "num_tokens"],
    temperature: float,
) -> Int[Array, "num_tokens"]:
    def step(window: _Window, key: Key[Array, ""]) -> tuple[_Window, Int[Array, ""]]:
        hidden = model.apply({"params": params}, window.tokens, method="hidden")
        last = jax.lax.dynamic_slice_in_dim(hidden, window.length - 1, 1, axis=1)
        logits = model.apply({"params": params}, last, method="logits")[0, 0]
        token = jax.random.categorical(key, logits / temperature).astype(window.tokens.dtype)
        return window.append(token), token

    _, tokens = jax.lax.scan(step, window, keys)
    return tokens
