"""Causal attention on a TPU, with norms and rotation of its heads, as one kernel forward and one backward.

    context = softmax(scale * R(N(q)) R(N(k))^T + causal mask) N(v)

q, k and v are read as they were projected, and their gradients written so: normalized or rotated heads never leave the
core. A kernel holds all positions of a head, which `fits` says of a length; tpu_splash.py has what is longer, and
sequences that a mesh splits.
"""

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads
from hybridnorm_jax.kernels.backend_names import SPLASH_TILE
from hybridnorm_jax.kernels.head_preparation import HeadNorm, Preparation
from hybridnorm_jax.kernels.tpu_attention_backward import Gradients, Kept, Results, backward_kernel
from hybridnorm_jax.kernels.tpu_attention_blocks import LANES, KernelInputs
from hybridnorm_jax.kernels.tpu_attention_forward import forward_kernel
from hybridnorm_jax.mesh.each_device import on_each_device
from hybridnorm_jax.mesh.split_axes import Axes, parts, split_axes

# Of the 128 MiB (v5e, v6e) or 64 MiB (v5p, v7x) of memory beside the arithmetic units; XLA uses the rest for its own.
MEMORY = 48 * 2**20
# Products in full float32 take this much of it for parts of their operands: 13 MiB were seen, with heads of 256.
FLOAT32_PRODUCTS = 16 * 2**20
_interpret = False  # tests set it


def fits(*, seq: int, head_dim: int, dtype: Any) -> bool:
    """Whether the backward kernel, the larger one, can hold a head of this length."""
    seq = _padded(seq)
    narrow, channels = jnp.dtype(dtype).itemsize, -(-head_dim // LANES) * LANES
    passing = 2 * 8 * head_dim * narrow  # q, k, v, context and its gradient in, three gradients out, each twice
    kept = 3 * head_dim * 4 + 2 * head_dim * narrow + 2 * channels * narrow
    tables = 2 * 2 * head_dim // 2 * 4 + LANES * 4 + 6 * 8 * 4
    columns = 2 * 12 * head_dim * LANES * 4  # scale and bias of three norms and their gradients, each twice
    products = FLOAT32_PRODUCTS if narrow == 4 else 0
    return seq * (passing + kept + tables) + columns + products <= MEMORY


def tpu_attention(inputs: AttentionInputs, preparation: Preparation, *, scale: float, saved_as: str) -> Heads:
    """softmax_attention of prepared heads; on a mesh once per device, on its share of sequences and heads.

    Args:
      scale: factor of q k^T.
      saved_as: checkpoint name of the context and the logarithm of the softmax's denominator.
    """
    query, key, value, segment_ids = inputs
    batch, seq, heads, _ = query.shape
    rows, columns = split_axes("batch", batch), split_axes("heads", heads)
    # As many key heads as the axes divide; query head h still reads the same values.
    copies = parts(columns) // math.gcd(parts(columns), key.shape[2]) if columns else 1
    padding = _padded(seq) - seq
    cos, sin = preparation.rotation or (None, None)
    kernel_inputs = KernelInputs(
        query=_positions_last(query, padding),
        key=_positions_last(jnp.repeat(key, copies, axis=2), padding),
        value=_positions_last(jnp.repeat(value, copies, axis=2), padding),
        segment_ids=None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)))[:, None, :],
        cos=None if cos is None else _table(cos, padding),
        sin=None if sin is None else _table(sin, padding),
        query_norm=_as_columns(preparation.query),
        key_norm=_as_columns(preparation.key),
        value_norm=_as_columns(preparation.value),
    )
    context = _attention(kernel_inputs, rows, columns, scale, saved_as)
    return jnp.moveaxis(context[..., :seq], 3, 1)


def _padded(seq: int) -> int:
    return seq + -seq % SPLASH_TILE


def _positions_last(x: Heads, padding: int) -> Float[Array, "batch heads head_dim seq"]:
    """Filled up at the end with the last position: without an epsilon a norm of zeros would not be finite.

    jnp.pad(..., mode="edge") would also add nothing to the split dimension of sequences, for which XLA exchanges them.
    """
    if padding:
        x = jnp.concatenate([x, jnp.repeat(x[:, -1:], padding, axis=1)], axis=1)
    return jnp.moveaxis(x, 1, 3)


def _table(x: Float[Array, "batch seq 1 half"], padding: int) -> Float[Array, "batch half seq"]:
    return jnp.moveaxis(jnp.pad(x[:, :, 0], ((0, 0), (0, padding), (0, 0))), 1, 2)


def _as_columns(norm: HeadNorm | None) -> HeadNorm | None:
    return jax.tree.map(lambda parameter: parameter.astype(jnp.float32)[:, None], norm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _attention(inputs: KernelInputs, rows: Axes, columns: Axes, scale: float, saved_as: str) -> Array:
    context, _ = _forward(inputs, rows, columns, scale, saved_as)
    return context


def _forward(
    inputs: KernelInputs, rows: Axes, columns: Axes, scale: float, saved_as: str
) -> tuple[Array, tuple[Any, ...]]:
    heads = PartitionSpec(rows, columns)
    mapped = on_each_device(
        functools.partial(_call_forward, scale), in_specs=(_specs(inputs, rows, columns),), out_specs=(heads, heads)
    )
    context, log_total = (checkpoint_name(array, saved_as) for array in mapped(inputs))
    return context, (inputs, context, log_total)


def _backward(
    rows: Axes, columns: Axes, scale: float, saved_as: str, kept: tuple[KernelInputs, Array, Array], d_context: Array
) -> tuple[KernelInputs]:
    inputs, context, log_total = kept
    heads, specs = PartitionSpec(rows, columns), _specs(inputs, rows, columns)
    norms = jax.tree.map(lambda _: heads, (inputs.query_norm, inputs.key_norm, inputs.value_norm))
    local = functools.partial(_call_backward, scale)
    mapped = on_each_device(
        local,
        in_specs=(specs, Results(heads, heads, heads)),
        out_specs=Gradients(heads, heads, heads, *norms),
    )
    gradients = mapped(inputs, Results(context, log_total, d_context))

    def total(norm: HeadNorm | None) -> HeadNorm | None:
        return jax.tree.map(lambda parts_of_it: parts_of_it.sum((0, 1)), norm)

    return (
        KernelInputs(
            query=gradients.query,
            key=gradients.key,
            value=gradients.value,
            segment_ids=None,
            cos=None if inputs.cos is None else jnp.zeros_like(inputs.cos),
            sin=None if inputs.sin is None else jnp.zeros_like(inputs.sin),
            query_norm=total(gradients.query_norm),
            key_norm=total(gradients.key_norm),
            value_norm=total(gradients.value_norm),
        ),
    )


_attention.defvjp(_forward, _backward)


def _specs(inputs: KernelInputs, rows: Axes, columns: Axes) -> KernelInputs:
    """How the arrays are split among the devices."""
    heads, everywhere = PartitionSpec(rows, columns), PartitionSpec()
    table = None if inputs.cos is None else PartitionSpec(rows if inputs.cos.shape[0] > 1 else None)
    norms = jax.tree.map(lambda _: everywhere, (inputs.query_norm, inputs.key_norm, inputs.value_norm))
    ids = None if inputs.segment_ids is None else PartitionSpec(rows)
    return KernelInputs(heads, heads, heads, ids, table, table, *norms)


def _call_forward(scale: float, inputs: KernelInputs) -> tuple[Array, Array]:
    """(context, log_total) of one device's share."""
    batch, heads, head_dim, seq = inputs.query.shape
    dtype = inputs.query.dtype
    block = _block(seq)
    kernel = functools.partial(forward_kernel, block=block, scale=scale)
    return pl.pallas_call(
        kernel,
        grid=_grid(inputs),
        in_specs=(_input_blocks(inputs),),
        out_specs=(_query_head(inputs, head_dim), _query_head(inputs, 1)),
        out_shape=(
            jax.ShapeDtypeStruct(inputs.query.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, seq), jnp.float32),
        ),
        scratch_shapes=(
            pltpu.VMEM((seq, head_dim), dtype),
            pltpu.VMEM((head_dim, seq), dtype),
            None if inputs.segment_ids is None else pltpu.VMEM((seq, LANES), jnp.int32),
        ),
        name="causal_attention_forward",
        **_how(block),
    )(inputs)


def _call_backward(scale: float, inputs: KernelInputs, results: Results) -> Gradients:
    """The gradients of one device's share; those of norms for each sequence and key head, to be added up."""
    batch, _, head_dim, seq = inputs.query.shape
    kv_heads, dtype, block = inputs.key.shape[1], inputs.query.dtype, _block(seq)
    query_head, key_head = _query_head(inputs, head_dim), _key_head(head_dim, seq)
    heads = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (inputs.query, inputs.key, inputs.value)]
    norms = (inputs.query_norm, inputs.key_norm, inputs.value_norm)
    sums = jax.ShapeDtypeStruct((batch, kv_heads, head_dim, 1), jnp.float32)
    wide = pltpu.VMEM((head_dim, seq), jnp.float32)
    (gradients,) = pl.pallas_call(
        functools.partial(backward_kernel, block=block, scale=scale),
        grid=_grid(inputs),
        in_specs=(_input_blocks(inputs), Results(query_head, _query_head(inputs, 1), query_head)),
        out_specs=(Gradients(query_head, key_head, key_head, *jax.tree.map(lambda _: _key_head(head_dim, 1), norms)),),
        out_shape=(Gradients(*heads, *jax.tree.map(lambda _: sums, norms)),),
        scratch_shapes=(
            Kept(
                queries=pltpu.VMEM((head_dim, seq), dtype),
                keys=pltpu.VMEM((head_dim, seq), dtype),
                key_rows=pltpu.VMEM((seq, head_dim), dtype),
                value_rows=pltpu.VMEM((seq, head_dim), dtype),
                d_query=wide,
                d_key=wide,
                d_value=wide,
                mean_gradient=pltpu.VMEM((1, seq), jnp.float32),
                columns_of_ids=None if inputs.segment_ids is None else pltpu.VMEM((seq, LANES), jnp.int32),
            ),
        ),
        name="causal_attention_backward",
        **_how(block),
    )(inputs, results)
    return gradients


def _block(seq: int) -> int:
    return next(size for size in (512, 256, SPLASH_TILE) if seq % size == 0)


def _grid(inputs: KernelInputs) -> tuple[int, int, int]:
    """Sequences, key heads, and the query heads that read them."""
    kv_heads = inputs.key.shape[1]
    return inputs.query.shape[0], kv_heads, inputs.query.shape[1] // kv_heads


def _how(block: int) -> dict[str, Any]:
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        "metadata": {"xprof_metadata": json.dumps({"block_q": block, "block_kv": block})},
        "interpret": _interpret,
    }


def _query_head(inputs: KernelInputs, size: int) -> pl.BlockSpec:
    """A query head's share of an array (batch, heads, size, seq)."""
    readers, seq = inputs.query.shape[1] // inputs.key.shape[1], inputs.query.shape[3]
    return pl.BlockSpec((None, None, size, seq), lambda batch, head, reader: (batch, head * readers + reader, 0, 0))


def _key_head(size: int, seq: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size, seq), lambda batch, head, reader: (batch, head, 0, 0))


def _input_blocks(inputs: KernelInputs) -> KernelInputs:
    """Each array's share of one run of a kernel."""
    head_dim, seq = inputs.query.shape[2:]
    key_head = _key_head(head_dim, seq)
    of_sequence = pl.BlockSpec((None, 1, seq), lambda batch, head, reader: (batch, 0, 0))
    table = None
    if inputs.cos is not None:
        shared = inputs.cos.shape[0] == 1
        half = inputs.cos.shape[1]
        table = pl.BlockSpec((None, half, seq), lambda batch, head, reader: (0 if shared else batch, 0, 0))
    column = pl.BlockSpec((head_dim, 1), lambda batch, head, reader: (0, 0))
    norms = jax.tree.map(lambda _: column, (inputs.query_norm, inputs.key_norm, inputs.value_norm))
    ids = None if inputs.segment_ids is None else of_sequence
    return KernelInputs(_query_head(inputs, head_dim), key_head, key_head, ids, table, table, *norms)
