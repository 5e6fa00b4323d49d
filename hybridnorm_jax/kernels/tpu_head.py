"""What the loss reads of the logits on a TPU, as one kernel forward and one backward.

    z = cap tanh(scale hidden table^T / cap),   log_z = log sum exp(z),   chosen = z[target]

The forward kernel finds log_z and chosen while z is in the core, and writes exp(z - largest z so far) to memory once,
in the dtype of `hidden`; with a cap it writes z, in float32. The backward kernel reads that once, forms the gradient of
z, and multiplies it with the table and with `hidden`. No product is computed twice. XLA by itself writes z in float32
and reads it three times.

Not measured on a TPU. Counted in the compiled step, see docs/tpus.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.token_logits import TokenLogits
from hybridnorm_jax.kernels.tpu_head_kernels import (
    BackwardInputs,
    Form,
    Head,
    Kept,
    backward_kernel,
    forward_kernel,
)
from hybridnorm_jax.mesh.each_device import on_each_device
from hybridnorm_jax.mesh.split_axes import Axes, parts, split_axes

LANES = 128
# Rows of the table that are taken at a time.
TILE = 256
# Of the memory beside the arithmetic units; XLA uses the rest for its own.
SHARE_OF_MEMORY = 0.75
# Where no TPU says how much it has: three quarters of a v5p's.
MEMORY = 48 * 2**20
# Products in full float32 take this much of it for parts of their operands, and others less.
PRODUCTS = {4: 16 * 2**20, 2: 4 * 2**20}
_interpret = False  # tests set it


class HeadTable(NamedTuple):
    """What the head multiplies with, as a kernel takes it.

    Attributes:
      table: (vocab, embed) or (embed, vocab), in the dtype of the products. It has no gradient of its own.
      sums: zeros that nobody reads, in float32, (devices, *table): their gradient is that of the table by the tokens of
        each device. So it is summed over the devices once, after everything else has been added to it.
    """

    table: Float[Array, "..."]
    sums: Float[Array, "devices ..."]


def head_table(table: Float[Array, "..."], ids: Int[Array, "batch seq"], *, dtype: Any) -> HeadTable:
    """Of the head's parameter; `ids` are the tokens of the batch."""
    return HeadTable(jax.lax.stop_gradient(table.astype(dtype)), _sums(table, _places(*ids.shape)))


def head_table_and_rows(
    table: Float[Array, "vocab embed"], ids: Int[Array, "batch seq"], *, dtype: Any
) -> tuple[HeadTable, Float[Array, "batch seq embed"]]:
    """Of a table that is the token embedding as well: also its rows of these tokens, NaN for an id outside of it.

    The gradient of the rows is added where the head's gradient of the table is. XLA by itself would add it to a table
    of zeros, and then add up both tables.
    """
    narrow = jax.lax.stop_gradient(table.astype(dtype))
    rows, sums = _rows_and_sums(table, narrow, jnp.where(ids < 0, len(table), ids), _places(*ids.shape))
    return HeadTable(narrow, sums), rows


class _Places(NamedTuple):
    """The mesh axes that split the sequences of a batch, and their positions."""

    rows: Axes
    columns: Axes

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.columns)

    @property
    def devices(self) -> PartitionSpec:
        """Of an array whose first dimension counts the devices that have tokens of their own."""
        return PartitionSpec((*self.rows, *self.columns))


def _places(batch: int, seq: int) -> _Places:
    return _Places(split_axes("batch", batch), split_axes("seq", seq))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sums(table: Array, places: _Places) -> Array:
    return jnp.zeros((parts((*places.rows, *places.columns)), *table.shape), jnp.float32)


def _sums_forward(table: Array, places: _Places) -> tuple[Array, Array]:
    return _sums(table, places), jnp.zeros((), table.dtype)


def _sums_backward(places: _Places, like_table: Array, d_sums: Array) -> tuple[Array]:
    return (d_sums.sum(0).astype(like_table.dtype),)


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows_and_sums(table: Array, narrow: Array, ids: Array, places: _Places) -> tuple[Array, Array]:
    return jnp.take(narrow, ids, axis=0), _sums(table, places)


def _rows_forward(
    table: Array, narrow: Array, ids: Array, places: _Places
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _rows_and_sums(table, narrow, ids, places), (ids, jnp.zeros((), table.dtype))


def _rows_backward(
    places: _Places, kept: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, None, None]:
    ids, like_table = kept

    def add(sums: Array, ids: Array, d_rows: Array) -> Array:
        return sums.at[0, ids].add(d_rows.astype(sums.dtype))

    mapped = on_each_device(add, in_specs=(places.devices, places.tokens, places.tokens), out_specs=places.devices)
    d_rows, d_sums = gradients
    (d_table,) = _sums_backward(places, like_table, mapped(d_sums, ids, d_rows))
    return d_table, None, None


_rows_and_sums.defvjp(_rows_forward, _rows_backward)


def head_token_logits(
    hidden: Float[Array, "batch seq embed"],
    head: HeadTable,
    targets: Int[Array, "batch seq"],
    *,
    form: Form,
) -> TokenLogits:
    """token_logits of what `form` makes of the product of `hidden` and the table, in float32.

    The gradient of the product is rounded to the dtype of both, as operand of its two products. Where there is no cap,
    so are the exponentials of the softmax that it is formed from, but for those of the targets. On a mesh each device
    takes its share of the tokens and the whole table.

    Args:
      hidden: in bfloat16 or float32; of the same sequences, and of positions that are split in the same way, as the
        tokens that `head` was made for.
      form: of the table and the logits.
    """
    return _token_logits(hidden, head.table, head.sums, targets, (_places(*targets.shape), form))


def token_block(tokens: int, embed: int, dtype: Any, *, capped: bool) -> int:
    """How many tokens the backward kernel, the larger one, takes at a time; 0: no LANES of them fit into the core.

    What it reads and what it writes of these tokens stays there, while the table passes by.
    """
    narrow, channels = jnp.dtype(dtype).itemsize, -(-embed // LANES) * LANES
    # What is kept of the logits, twice, and the gradient of the products; six rows in float32, of eight each, twice.
    kept = 4 if capped else narrow
    per_token = channels * (narrow + 4) + TILE * (2 * kept + narrow) + 6 * 2 * 8 * 4
    # The table's tile and that of its gradient, each twice, the gradient's once more as the result of a product.
    fixed = TILE * channels * (2 * narrow + narrow + 3 * 4) + PRODUCTS[narrow] + 4 * channels * TILE
    most = int(_memory() - fixed) // per_token // LANES
    needed = -(-tokens // LANES)
    if most < 1:
        return 0
    # Blocks of one length, so that little is filled up.
    return -(-needed // -(-needed // most)) * LANES


def _memory() -> float:
    return SHARE_OF_MEMORY * pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else MEMORY


# hidden, table, targets, and what the forward kernel found and wrote.
_Residuals = tuple[Array, Array, Array, TokenLogits, Kept]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_logits(
    hidden: Array, table: Array, sums: Array, targets: Array, layout: tuple[_Places, Form]
) -> TokenLogits:
    found, _ = _forward(hidden, table, sums, targets, layout)
    return found


def _forward(
    hidden: Array, table: Array, sums: Array, targets: Array, layout: tuple[_Places, Form]
) -> tuple[TokenLogits, _Residuals]:
    places, form = layout
    tokens, everywhere = places.tokens, PartitionSpec()
    mapped = on_each_device(
        functools.partial(_call_forward, form),
        in_specs=(tokens, everywhere, tokens),
        out_specs=(TokenLogits(tokens, tokens), Kept(places.devices, places.devices)),
    )
    found, kept = mapped(hidden, table, targets)
    return found, (hidden, table, targets, found, kept)


def _backward(layout: tuple[_Places, Form], kept: _Residuals, gradient: TokenLogits) -> tuple[Array, None, Array, None]:
    places, form = layout
    tokens, everywhere, devices = places.tokens, PartitionSpec(), places.devices
    mapped = on_each_device(
        functools.partial(_call_backward, form),
        in_specs=(
            *(tokens, everywhere, tokens, TokenLogits(tokens, tokens)),
            *(Kept(devices, devices), TokenLogits(tokens, tokens)),
        ),
        out_specs=(tokens, devices),
    )
    d_hidden, d_sums = mapped(*kept, gradient)
    return d_hidden, None, d_sums, None


_token_logits.defvjp(_forward, _backward)


class _Blocks:
    """How one device's arrays are cut.

    Attributes:
      tokens, filled: of the device, and filled up to a multiple of `block`, the tokens that are taken at a time.
      grid: blocks of tokens, and tiles of the vocabulary, the last of which may be a part of one.
    """

    def __init__(self, hidden: Array, table: Array, form: Form):
        batch, seq, self.embed = hidden.shape
        self.vocab = table.shape[0 if form.vocab_first else 1]
        self.form = form
        self.tokens = batch * seq
        self.block = token_block(self.tokens, self.embed, hidden.dtype, capped=form.cap is not None)
        blocks = -(-self.tokens // self.block)
        self.filled = blocks * self.block
        self.grid = (blocks, -(-self.vocab // TILE))

    def row(self, of_tokens: Array) -> Float[Array, "1 filled"]:
        """One number of each token."""
        return jnp.pad(of_tokens.reshape(1, -1), ((0, 0), (0, self.filled - self.tokens)))

    def matrix(self, hidden: Array) -> Float[Array, "filled embed"]:
        """One row of each token, zeros behind them."""
        return jnp.pad(hidden.reshape(-1, self.embed), ((0, self.filled - self.tokens), (0, 0)))

    @property
    def of_row(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.block), lambda block, tile: (0, block))

    @property
    def of_matrix(self) -> pl.BlockSpec:
        """Of (filled, embed). There is one copy of it, because it changes with the block of tokens alone."""
        return pl.BlockSpec((self.block, self.embed), lambda block, tile: (block, 0), pipeline_mode=pl.Buffered(1))

    @property
    def of_columns(self) -> pl.BlockSpec:
        """As of_matrix, of (embed, filled)."""
        return pl.BlockSpec((self.embed, self.block), lambda block, tile: (0, block), pipeline_mode=pl.Buffered(1))

    @property
    def of_kept(self) -> Kept:
        return Kept(
            pl.BlockSpec((None, TILE, self.block), lambda block, tile: (0, tile, block)),
            pl.BlockSpec((None, None, 1, self.block), lambda block, tile: (0, tile, 0, block)),
        )

    @property
    def of_table(self) -> pl.BlockSpec:
        if self.form.vocab_first:
            return pl.BlockSpec((TILE, self.embed), lambda block, tile: (tile, 0))
        return pl.BlockSpec((self.embed, TILE), lambda block, tile: (0, tile))

    @property
    def of_tables(self) -> pl.BlockSpec:
        """Of a table for each block of tokens."""
        if self.form.vocab_first:
            return pl.BlockSpec((None, TILE, self.embed), lambda block, tile: (block, tile, 0))
        return pl.BlockSpec((None, self.embed, TILE), lambda block, tile: (block, 0, tile))

    @property
    def head(self) -> Head:
        return Head(vocab=self.vocab, tile=TILE, form=self.form)

    @property
    def how(self) -> dict[str, Any]:
        return {
            "grid": self.grid,
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(_memory())
            ),
            "interpret": _interpret,
        }


def _call_forward(form: Form, hidden: Array, table: Array, targets: Array) -> tuple[TokenLogits, Kept]:
    """(log_z and chosen as the targets are, what is kept, with a first dimension of 1) of one device."""
    blocks = _Blocks(hidden, table, form)
    row = jax.ShapeDtypeStruct((1, blocks.filled), jnp.float32)
    shapes = Kept(
        jax.ShapeDtypeStruct((1, blocks.vocab, blocks.filled), hidden.dtype if form.cap is None else jnp.float32),
        jax.ShapeDtypeStruct((1, blocks.grid[1], 1, blocks.filled), jnp.float32),
    )
    kept, log_z, chosen = pl.pallas_call(
        functools.partial(forward_kernel, blocks.head),
        in_specs=(blocks.of_columns, blocks.of_table, blocks.of_row),
        out_specs=(blocks.of_kept, blocks.of_row, blocks.of_row),
        out_shape=(shapes, row, row),
        scratch_shapes=(pltpu.VMEM((1, blocks.block), jnp.float32), pltpu.VMEM((1, blocks.block), jnp.float32)),
        name="head_forward",
        **blocks.how,
    )(blocks.matrix(hidden).T, table, blocks.row(targets))
    found = TokenLogits(*(x[0, : blocks.tokens].reshape(targets.shape) for x in (log_z, chosen)))
    return found, kept


def _call_backward(
    form: Form,
    hidden: Array,
    table: Array,
    targets: Array,
    found: TokenLogits,
    kept: Kept,
    gradient: TokenLogits,
) -> tuple[Array, Array]:
    """(gradient of hidden, that of the table in float32 as (1, *table)) of one device."""
    blocks = _Blocks(hidden, table, form)
    row = blocks.of_row
    d_columns, d_tables = pl.pallas_call(
        functools.partial(backward_kernel, blocks.head),
        in_specs=(
            BackwardInputs(
                hidden=blocks.of_matrix,
                table=blocks.of_table,
                kept=blocks.of_kept,
                targets=row,
                log_z=row,
                chosen=row,
                d_log_z=row,
                d_chosen=row,
            ),
        ),
        out_specs=(blocks.of_columns, blocks.of_tables),
        out_shape=(
            jax.ShapeDtypeStruct((blocks.embed, blocks.filled), jnp.float32),
            jax.ShapeDtypeStruct((blocks.grid[0], *table.shape), jnp.float32),
        ),
        scratch_shapes=(pltpu.VMEM((TILE, blocks.block), hidden.dtype),),
        name="head_backward",
        **blocks.how,
    )(
        BackwardInputs(
            hidden=blocks.matrix(hidden),
            table=table,
            kept=kept,
            targets=blocks.row(targets),
            log_z=blocks.row(found.log_z),
            chosen=blocks.row(found.chosen),
            d_log_z=blocks.row(gradient.log_z),
            d_chosen=blocks.row(gradient.chosen),
        )
    )
    d_hidden = d_columns.T[: blocks.tokens].reshape(hidden.shape).astype(hidden.dtype)
    # Sums of two, and not jnp.sum, which XLA would not fuse with what is done to the result.
    return d_hidden, functools.reduce(jnp.add, list(d_tables))[None]
