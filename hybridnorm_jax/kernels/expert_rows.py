"""Rows sorted by expert: one for each choice that a token makes, and the way back to the tokens.

Each of T tokens chooses k experts: `chosen`, (T, k). Choice c is element c of chosen.reshape(-1), made by token c // k.

`spread` and `collect` are each other's transpose, and each is the other's gradient. So both gradients gather, too. The
scatter-add that JAX would derive instead adds one row after the other on a CPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.precision import wide_dtype

Tokens = Float[Array, "tokens embed"]
Rows = Float[Array, "rows embed"]
GroupSizes = Int[Array, " experts"]


class RowOrder(NamedTuple):
    """The tokens * k choices sorted by expert, those of one expert by token; each choice has one row.

    Attributes:
      choice_of_row: for each row, the index of its choice in chosen.reshape(-1).
      row_of_choice: for each choice, the index of its row; the inverse permutation, in the shape of `chosen`.
    """

    choice_of_row: Int[Array, " rows"]
    row_of_choice: Int[Array, "tokens k"]


def sort_by_expert(chosen: Int[Array, "tokens k"], experts: int) -> tuple[RowOrder, GroupSizes]:
    """The order of the rows, and how many rows each expert has."""
    flat = chosen.reshape(-1)
    choices = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rows = jnp.zeros_like(choices).at[choices].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    order = RowOrder(choice_of_row=choices, row_of_choice=rows.reshape(chosen.shape))
    return order, jnp.bincount(flat, length=experts).astype(jnp.int32)


@jax.custom_vjp
def spread(x: Tokens, order: RowOrder) -> Rows:
    """rows[i] = x[the token that made the choice of row i]."""
    _, k = order.row_of_choice.shape
    return x[order.choice_of_row // k]


@jax.custom_vjp
def collect(rows: Rows, order: RowOrder) -> Tokens:
    """tokens[t] = the sum of the k rows of token t, in float32 at least."""
    return rows[order.row_of_choice].sum(1, dtype=wide_dtype(rows.dtype)).astype(rows.dtype)


def _spread_forward(x: Tokens, order: RowOrder) -> tuple[Rows, RowOrder]:
    return spread(x, order), order


def _spread_backward(order: RowOrder, d_rows: Rows) -> tuple[Tokens, None]:
    return collect(d_rows, order), None


def _collect_forward(rows: Rows, order: RowOrder) -> tuple[Tokens, RowOrder]:
    return collect(rows, order), order


def _collect_backward(order: RowOrder, d_tokens: Tokens) -> tuple[Rows, None]:
    return spread(d_tokens, order), None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def pad_rows(array: Array, count: int) -> Array:
    """`count` more rows of zeros at the end."""
    unchanged = [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, [(0, count), *unchanged])
