"""The experts of one layer on all devices of a mesh.

Every device holds a share of the experts (logical axis "experts") and, of each, a share of the hidden layer ("mlp").
Devices that differ along the experts' mesh axes gather their tokens, each computes what its own experts make of all of
them, and the results are summed and scattered back. No capacity bounds what an expert takes, so nothing is dropped at
any imbalance. With n devices along these axes a device receives n - 1 times its tokens, where sending every token to
its k experts, the usual all-to-all, would take k (n - 1) / n times as much: no more traffic up to n = k.
"""

from functools import partial

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.experts import InputKernels, OutputKernels, apply_experts
from hybridnorm_jax.mesh.logical_axes import split_axes

Axes = tuple[str, ...]


def apply_experts_on_mesh(
    x: Float[Array, "batch seq embed"],
    gate: InputKernels,
    up: InputKernels,
    down: OutputKernels,
    weights: Float[Array, "batch seq k"],
    chosen: Int[Array, "batch seq k"],
    *,
    dispatch: str,
) -> Float[Array, "batch seq embed"]:
    """experts.apply_experts on global arrays, computed where the mesh in force and Flax's logical rules say.

    Mesh and rules: see logical_axes.split_axes; where nothing is split, it is apply_experts. A dimension that its mesh
    axes do not divide stays whole. Memory of one device: O(n tokens k) rows for its own `tokens` and n devices along
    the experts' axes, which holds any imbalance.
    """
    sizes = {"batch": x.shape[0], "seq": x.shape[1], **dict(zip(("experts", "embed", "mlp"), gate.shape, strict=True))}
    axes = _without_sharing({name: split_axes(name, size) for name, size in sizes.items()})
    if not any(axes.values()):
        return _local(x, gate, up, down, weights, chosen, dispatch=dispatch)
    tokens = PartitionSpec(axes["batch"], axes.pop("seq"))
    inputs = PartitionSpec(axes["experts"], axes["embed"], axes["mlp"])
    outputs = PartitionSpec(axes["experts"], axes["mlp"], axes["embed"])
    local = partial(_local, dispatch=dispatch, **axes)
    specs = (tokens, inputs, inputs, outputs, tokens, tokens)
    return jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)(x, gate, up, down, weights, chosen)


def _without_sharing(axes: dict[str, Axes]) -> dict[str, Axes]:
    """Of dimensions that would share a mesh axis, in the kernels or among tokens, the later ones stay whole.

    `batch` may share axes with the kernels: its tokens are gathered along these.
    """
    taken = set()
    for name in ("experts", "mlp", "embed"):
        axes[name] = axes[name] if taken.isdisjoint(axes[name]) else ()
        taken.update(axes[name])
    if not {*axes["batch"], *axes["experts"], *axes["mlp"]}.isdisjoint(axes["seq"]):
        axes["seq"] = ()
    return axes


def _local(
    x,
    gate,
    up,
    down,
    weights,
    chosen,
    *,
    dispatch,
    batch: Axes = (),
    experts: Axes = (),
    embed: Axes = (),
    mlp: Axes = (),
):
    """One device's part: its own experts on the tokens of all devices that share the experts with it."""
    if embed:  # gathered here and not on the way in, so that the gradients are scattered while they are summed
        gate, up = (jax.lax.all_gather(kernels, embed, axis=1, tiled=True) for kernels in (gate, up))
        down = jax.lax.all_gather(down, embed, axis=2, tiled=True)
    # Tokens of all devices whose results are summed.
    gathered = tuple(axis for axis in (*experts, *mlp) if axis in batch)
    if gathered:
        x, weights, chosen = (jax.lax.all_gather(array, gathered, tiled=True) for array in (x, weights, chosen))
    if experts:
        chosen = chosen - len(gate) * jax.lax.axis_index(experts)
    x_rows, weight_rows, chosen_rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
    y = apply_experts(x_rows, gate, up, down, weight_rows, chosen_rows, dispatch=dispatch, elsewhere=bool(experts))
    y = y.reshape(x.shape)
    if summed := tuple(axis for axis in (*experts, *mlp) if axis not in gathered):
        y = jax.lax.psum(y, summed)
    return jax.lax.psum_scatter(y, gathered, tiled=True) if gathered else y
