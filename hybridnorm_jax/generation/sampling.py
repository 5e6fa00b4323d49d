"""Text from a model, token by token."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder


def generate(
    config: ModelConfig,
    params: Any,
    prompt: Int[np.ndarray, " prompt"],
    *,
    num_tokens: int,
    window: int,
    key: Array,
    temperature: float = 0.8,
) -> np.ndarray:
    """Draw num_tokens from softmax(logits / temperature), each after at most the `window` tokens before it.

    Every token costs a forward pass over the whole window: meant for a look at a model, not for serving one.

    Args:
      prompt: one token at least; its last `window` tokens are read.
      temperature: above 0.
    """
    # The window is padded behind the tokens, which a causal model does not see; plain attention takes any length. The
    # parameters may lie on many devices, between which XLA cannot divide a kernel of Pallas by itself.
    model = Decoder(dataclasses.replace(config, attention="xla", expert_dispatch="blocked"))
    prompt = np.asarray(prompt, np.int32)[-window:]
    buffer = np.zeros((1, window), np.int32)
    buffer[0, : len(prompt)] = prompt
    drawn = _draw(model, params, jnp.asarray(buffer), len(prompt), jax.random.split(key, num_tokens), temperature)
    return np.asarray(drawn)


@partial(jax.jit, static_argnums=0)
def _draw(model, params, buffer, length, keys, temperature):
    window = buffer.shape[1]

    def step(carry, key):
        buffer, length = carry
        hidden = model.apply({"params": params}, buffer, method="hidden")
        last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
        logits = model.apply({"params": params}, last, method="logits")[0, 0]
        token = jax.random.categorical(key, logits / temperature).astype(buffer.dtype)
        full = length == window
        buffer = jnp.where(full, jnp.roll(buffer, -1, axis=1), buffer)
        buffer = buffer.at[0, jnp.where(full, window - 1, length)].set(token)
        return (buffer, jnp.minimum(length + 1, window)), token

    return jax.lax.scan(step, (buffer, jnp.asarray(length, jnp.int32)), keys)[1]
