"""Checks of what the modules are called with: each names the argument, and the shape that would be right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def check_stream(x: Array) -> None:
    """Raise ValueError unless x is (batch, seq, embed) with at least one token in a row."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x: shape {x.shape} must be (batch, seq, embed), seq at least 1")


def check_tokens(tokens: Array) -> None:
    """Raise ValueError unless tokens are integers (batch, seq) with at least one token in a row."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: shape {tokens.shape} must be (batch, seq), seq at least 1")


def check_per_token(name: str, array: Array | None, batch: int, seq: int) -> None:
    """Raise ValueError unless the array has an entry for each token, or one row for all; None is no array."""
    if array is not None and array.shape not in ((batch, seq), (1, seq)):
        raise ValueError(f"{name}: shape {array.shape} must be ({batch}, {seq}), or (1, {seq}) for all rows")


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError for a size below 1."""
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")


def check_step(step: Any) -> None:
    """Raise ValueError unless it is one whole number of updates, at least 0; the value of a traced one is not known."""
    right = "must be one whole number, at least 0: how many updates were made"
    is_number = isinstance(step, int | np.integer | np.ndarray | Array) and not isinstance(step, bool)
    if not is_number or jnp.ndim(step) != 0 or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise ValueError(f"step={step!r:.80}: {right}")
    if not isinstance(step, jax.core.Tracer) and int(step) < 0:
        raise ValueError(f"step={int(step)}: {right}")
