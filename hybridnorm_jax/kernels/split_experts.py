"""The experts of one layer on all devices of a mesh.

Every device holds a share of the experts (logical axis "experts") and, of each, a share of the hidden layer ("mlp").
Devices that differ along the experts' mesh axes, and have different tokens, exchange rows (exchanged_experts.py).
Where they have the same tokens, or share the hidden layer, each computes what its own share makes of all tokens, and
the results are summed. No capacity bounds what an expert takes, so nothing is dropped at any imbalance.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.exchanged_experts import apply_exchanged_experts
from hybridnorm_jax.kernels.expert_dispatch import apply_experts
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.mesh.each_device import on_each_device
from hybridnorm_jax.mesh.gathered import gather
from hybridnorm_jax.mesh.split_axes import Axes, split_axes


class _Split(NamedTuple):
    """The mesh axes that split each dimension; none where it stays whole."""

    batch: Axes
    seq: Axes
    experts: Axes
    embed: Axes
    mlp: Axes


def apply_experts_on_mesh(
    x: Float[Array, "batch seq embed"],
    kernels: ExpertKernels,
    weights: Float[Array, "batch seq k"],
    chosen: Int[Array, "batch seq k"],
    *,
    dispatch: str,
) -> Float[Array, "batch seq embed"]:
    """experts.apply_experts on global arrays, computed where the mesh in force and Flax's logical rules say.

    Mesh and rules: see mesh/split_axes.py; where nothing is split, it is apply_experts. A dimension that its mesh axes
    do not divide stays whole. Memory of one device: O(tokens k) rows for its own `tokens`, at any imbalance.
    """
    split = _split(x, kernels)
    local = functools.partial(_local, split=split, dispatch=dispatch)
    if not any(split):
        return local(x, kernels, weights, chosen)
    tokens = PartitionSpec(split.batch, split.seq)
    inputs = PartitionSpec(split.experts, split.embed, split.mlp)
    outputs = PartitionSpec(split.experts, split.mlp, split.embed)
    specs = (tokens, kernels.replace(gate=inputs, up=inputs, down=outputs), tokens, tokens)
    return on_each_device(local, in_specs=specs, out_specs=tokens)(x, kernels, weights, chosen)


def _split(x: Float[Array, "batch seq embed"], kernels: ExpertKernels) -> _Split:
    """How the dimensions are split; of two that would share a mesh axis, the later one of an array stays whole.

    The dimensions of kernels come first: experts, then mlp, then embed. `batch` may share axes with the kernels: its
    tokens are gathered along these.
    """
    batch_size, seq_len, _ = x.shape
    num_experts, embed_size, mlp_size = kernels.gate.shape
    experts = split_axes("experts", num_experts)
    mlp = _unless_taken(split_axes("mlp", mlp_size), experts)
    embed = split_axes("embed", embed_size, taken=experts + mlp)
    batch = split_axes("batch", batch_size)
    seq = _unless_taken(split_axes("seq", seq_len), batch + experts + mlp)
    return _Split(batch=batch, seq=seq, experts=experts, embed=embed, mlp=mlp)


def _unless_taken(axes: Axes, taken: Axes) -> Axes:
    return axes if set(axes).isdisjoint(taken) else ()


def _local(
    x: Float[Array, "batch seq embed"],
    kernels: ExpertKernels,
    weights: Float[Array, "batch seq k"],
    chosen: Int[Array, "batch seq k"],
    *,
    split: _Split,
    dispatch: str,
) -> Float[Array, "batch seq embed"]:
    """One device's part: its own experts on the tokens of all devices that share the experts with it."""
    if split.embed:  # gathered here and not on the way in, so that the gradients are scattered while they are summed
        kernels = kernels.replace(
            gate=gather(kernels.gate, split.embed, 1),
            up=gather(kernels.up, split.embed, 1),
            down=gather(kernels.down, split.embed, 2),
        )
    # The results are summed over the devices that share the experts. Where these have different tokens, all need the
    # tokens of all, and each keeps the sums of its own; but along the experts' axes alone they exchange single rows.
    exchanged = bool(split.experts) and set(split.experts) <= set(split.batch)
    sharing = split.mlp if exchanged else split.experts + split.mlp
    gathered = tuple(axis for axis in sharing if axis in split.batch)
    summed = tuple(axis for axis in sharing if axis not in split.batch)
    if gathered:
        x, weights, chosen = (jax.lax.all_gather(array, gathered, tiled=True) for array in (x, weights, chosen))
    rows = _flat(x), kernels, _flat(weights)
    if exchanged:
        different = split.batch + split.seq
        flat = apply_exchanged_experts(*rows, _flat(chosen), axes=split.experts, different=different, dispatch=dispatch)
    elif split.experts:
        chosen = chosen - len(kernels.gate) * jax.lax.axis_index(split.experts)
        flat = apply_experts(*rows, _flat(chosen), dispatch=dispatch, elsewhere=True)
    else:
        flat = apply_experts(*rows, _flat(chosen), dispatch=dispatch)
    y = flat.reshape(x.shape)
    if summed:
        y = jax.lax.psum(y, summed)
    return jax.lax.psum_scatter(y, gathered, tiled=True) if gathered else y


def _flat(array: Array) -> Array:
    """Batch and positions as one dimension."""
    return array.reshape(-1, array.shape[-1])
