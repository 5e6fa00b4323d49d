"""The two kernels of tpu_head.py: one tile of the vocabulary with one block of tokens.

Tokens lie along the lanes, so that log_z and all that is known of a token is a row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.tpu_attention_blocks import dot, each_block, positions


class Form(NamedTuple):
    """Logits are cap * tanh(scale * product / cap).

    Attributes:
      vocab_first: the table is (vocab, embed), and not (embed, vocab).
      scale: None: 1.
      cap: None: there is none, and logits are scale * product.
    """

    vocab_first: bool
    scale: float | None = None
    cap: float | None = None

    def logits(self, products: Array) -> Array:
        if self.scale is not None:
            products = self.scale * products
        return products if self.cap is None else self.cap * jnp.tanh(products / self.cap)

    def through(self, gradient: Array, logits: Array | None) -> Array:
        """The gradient of products, from that of logits; `logits` is asked for where there is a cap."""
        if self.cap is not None:
            gradient = gradient * (1.0 - jnp.square(present(logits) / self.cap))
        return gradient if self.scale is None else self.scale * gradient


class Head(NamedTuple):
    """What a kernel knows when it is compiled.

    Attributes:
      vocab: rows of the table.
      tile: how many are taken at a time; the last tile may reach beyond the table, where what is read is undefined.
      form: of the table and the logits.
    """

    vocab: int
    tile: int
    form: Form

    def rows(self) -> "_Rows":
        """Those of the tile that this run of a kernel takes."""
        return _Rows(self, pl.program_id(1) * self.tile)


class _Rows(NamedTuple):
    """One tile of the table, from row `first`."""

    head: Head
    first: Any

    def ids(self, count: int) -> Int[Array, "tile count"]:
        """The token of each row, in every column."""
        return self.first + jax.lax.broadcasted_iota(jnp.int32, (self.head.tile, count), 0)

    def inside(self, x: Float[Array, "tile count"], outside: float) -> Float[Array, "tile count"]:
        """x, with another value in rows beyond the table."""
        if self.head.vocab % self.head.tile == 0:
            return x
        return jnp.where(self.ids(x.shape[1]) < self.head.vocab, x, jnp.asarray(outside, x.dtype))

    def whole(self, table: Any) -> Float[Array, "tile embed"]:
        """What a reference to this tile holds."""
        return table[...] if self.head.form.vocab_first else table[...].T


class Kept(NamedTuple):
    """What the backward kernel needs of the logits: exp(logits - largest), in the dtype of what the head reads.

    In bfloat16 each has the relative error of one rounding, however large its logit is. Logits in bfloat16 would give
    the softmax their absolute error as its relative one. Where there is a cap, whose slope needs the logits, the values
    are the logits, in float32.

    Attributes:
      values: (vocab, filled); in a kernel a reference to (tile, block).
      largest: in float32, the largest logit of a token in this tile and those before it, (tiles, 1, filled); in a
        kernel a reference to (1, block).
    """

    values: Any
    largest: Any


def forward_kernel(
    head: Head,
    hidden: Any,
    table: Any,
    targets: Any,
    kept: Kept,
    log_z: Any,
    chosen: Any,
    largest: Any,
    total: Any,
) -> None:
    """One tile with one block of tokens; the tiles follow each other.

    Args:
      hidden: reference to (embed, block).
      table: to a tile.
      targets: to (1, block).
      kept: takes what the backward kernel needs.
      log_z, chosen: take the results, (1, block).
      largest, total: keep the largest logit of a token and the sum of exp(logit - largest), (1, block).
    """
    tile, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(tile == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, jnp.finfo(jnp.float32).min)
        total[...] = jnp.zeros_like(total)
        chosen[...] = jnp.zeros_like(chosen)

    rows = head.rows()
    kernel = rows.whole(table)

    def add(index: Any) -> None:
        here = positions(index, _width(hidden))
        logits = head.form.logits(dot(kernel, hidden[:, here]))
        is_target = rows.ids(logits.shape[1]) == targets[:, here]
        chosen[:, here] += jnp.where(is_target, logits, 0.0).sum(axis=0, keepdims=True)
        logits = rows.inside(logits, -jnp.inf)
        before = largest[:, here]
        now = jnp.maximum(before, logits.max(axis=0, keepdims=True))
        exponentials = jnp.exp(logits - now)
        total[:, here] = total[:, here] * jnp.exp(before - now) + exponentials.sum(axis=0, keepdims=True)
        largest[:, here] = now
        kept.values[:, here] = (exponentials if head.form.cap is None else logits).astype(kept.values.dtype)
        kept.largest[:, here] = now

    each_block(hidden.shape[1], _width(hidden), add)

    @pl.when(tile == last)
    def _() -> None:
        log_z[...] = largest[...] + jnp.log(total[...])


class BackwardInputs(NamedTuple):
    """Arrays of one device; in the kernel references to what one run of it reads.

    Attributes:
      hidden: (block, embed).
      table: a tile.
      kept: as the forward kernel wrote it.
      targets: (1, block).
      log_z, chosen: what the forward kernel found, (1, block).
      d_log_z, d_chosen: their gradients, (1, block).
    """

    hidden: Any
    table: Any
    kept: Kept
    targets: Any
    log_z: Any
    chosen: Any
    d_log_z: Any
    d_chosen: Any


def backward_kernel(head: Head, inputs: BackwardInputs, d_hidden: Any, d_table: Any, d_logits: Any) -> None:
    """One tile with one block of tokens; the tiles follow each other, and add to the gradient of hidden.

    Args:
      inputs: references.
      d_hidden: takes the gradient of hidden in float32, (embed, block).
      d_table: takes this block's part of the gradient of the table's tile, in float32.
      d_logits: keeps the gradient of the products, rounded to the dtype of hidden, (tile, block).
    """
    block, width = d_hidden.shape[1], _width(d_hidden)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        d_hidden[...] = jnp.zeros_like(d_hidden)

    # Rows beyond the table would not be 0 times what is undefined.
    rows = head.rows()
    columns = rows.inside(rows.whole(inputs.table), 0.0).T

    def of_targets(here: Any) -> Float[Array, "1 width"]:
        """From the target's logit, which is known, and not from an exponential that was rounded, or is 0."""
        chosen = inputs.chosen[:, here]
        gradient = inputs.d_log_z[:, here] * jnp.exp(chosen - inputs.log_z[:, here]) + inputs.d_chosen[:, here]
        return head.form.through(gradient, chosen)

    def of_others(here: Any) -> Float[Array, "tile width"]:
        values, largest = inputs.kept.values[:, here].astype(jnp.float32), inputs.kept.largest[:, here]
        exponentials = values if head.form.cap is None else jnp.exp(values - largest)
        gradient = (inputs.d_log_z[:, here] * jnp.exp(largest - inputs.log_z[:, here])) * exponentials
        return head.form.through(gradient, values)

    def add(index: Any) -> None:
        here = positions(index, width)
        gradient = jnp.where(rows.ids(width) == inputs.targets[:, here], of_targets(here), of_others(here))
        gradient = rows.inside(gradient, 0.0).astype(d_logits.dtype)
        d_logits[:, here] = gradient
        d_hidden[:, here] += dot(columns, gradient)

    each_block(block, width, add)
    of_tile = dot(d_logits[...], inputs.hidden[...])
    d_table[...] = of_tile if head.form.vocab_first else of_tile.T


def _width(columns: Any) -> int:
    """How many of a reference's columns are taken at a time."""
    return next(size for size in (512, 256, 128) if columns.shape[1] % size == 0)
