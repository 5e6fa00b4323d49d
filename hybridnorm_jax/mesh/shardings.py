"""The device mesh, and which dimension of which array lies on which of its axes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.rules import MESH_AXES, Rules, resolve_rules

RULES = resolve_rules()

# Last two parts of a parameter's path -> its logical axes; inside a run "layers" comes first. Norms have no entry of
# their own: a vector is not worth the communication of sharding it.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "token_embedding/embedding": ("vocab", "embed"),
    "position_embedding/embedding": (None, "embed"),
    "head/kernel": ("embed", "vocab"),
    "head/bias": ("vocab",),
    "query/kernel": ("embed", "heads", "head_dim"),
    "key/kernel": ("embed", "kv_heads", "head_dim"),
    "value/kernel": ("embed", "kv_heads", "head_dim"),
    "out/kernel": ("heads", "head_dim", "embed"),
    "query/bias": ("heads", "head_dim"),
    "key/bias": ("kv_heads", "head_dim"),
    "value/bias": ("kv_heads", "head_dim"),
    "out/bias": (None,),
    "gate/kernel": ("embed", "mlp"),
    "up/kernel": ("embed", "mlp"),
    "down/kernel": ("mlp", "embed"),
    "gate/bias": ("mlp",),
    "up/bias": ("mlp",),
    "down/bias": (None,),
    # The router's result is needed whole by every token.
    "router/kernel": ("embed", None),
    "router/bias": (None,),
    "expert_gate/kernel": ("experts", "embed", "mlp"),
    "expert_up/kernel": ("experts", "embed", "mlp"),
    "expert_down/kernel": ("experts", "mlp", "embed"),
    "expert_gate/bias": ("experts", "mlp"),
    "expert_up/bias": ("experts", "mlp"),
    "expert_down/bias": ("experts", None),
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes MESH_AXES; on TPUs of several slices `replica` lies across the slices.

    Args:
      sizes: axis -> size, 1 where it is not named; one of them may be -1: all that are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or replica is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    given = int(np.prod([size for size in shape if size != -1]))
    shape = [len(devices) // given if size == -1 else size for size in shape]
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"{asked}: must multiply to the {len(devices)} devices there are, one of them may be -1")
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        try:
            return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # no axis of the torus has such a size: one has to be split
            split = create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(split, MESH_AXES, axis_types=types)
    if shape[0] % slices:
        right = f"must be a multiple of the {slices} slices, between which the network is slow"
        raise ConfigError(f"mesh.replica={shape[0]}: {right}")
    within, across = [shape[0] // slices, *shape[1:]], [slices, *[1] * (len(shape) - 1)]
    return Mesh(create_hybrid_device_mesh(within, across, devices), MESH_AXES, axis_types=types)


@contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Trace and run what is inside on this mesh, by the first entries of these rules."""
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules([(name, entries[0]) for name, entries in rules.items() if entries]))
        yield


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the parameter, or optimizer moment, at this path.

    Raises:
      KeyError: a matrix that PARAMETER_AXES does not name.
    """
    layers = ("layers",) if any(part.startswith("run_") for part in path) else ()
    axes = PARAMETER_AXES.get("/".join(path[-2:]))
    if axes is None and ndim - len(layers) <= 1:
        return layers[:ndim] + (None,) * (ndim - len(layers[:ndim]))
    if axes is None:
        raise KeyError(
            f"no logical axes for the parameter {'/'.join(path)}: mesh.shardings.PARAMETER_AXES must name it"
        )
    return layers + axes


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """The spec that the rules give these logical axes, see mesh.rules.DEFAULT_RULES."""
    taken: set[str] = set()
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        free = (entry for entry in rules.get(axis or "", ()) if not taken.intersection(entry))
        entry = next((entry for entry in free if size % _parts_of(entry, mesh) == 0), None)
        split = tuple(axis for axis in entry or () if mesh.shape[axis] > 1)
        taken.update(split)
        spec.append(split if len(split) > 1 else split[0] if split else None)
    return PartitionSpec(*spec)


def _parts_of(axes: tuple[str, ...], mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def _parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """For parameters, or a training state that holds trees like them: the same tree of NamedShardings."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(logical_axes(_parts(path), leaf.ndim), leaf.shape, mesh, rules))

    return jax.tree.map_with_path(sharding, tree)


def undivided(params: Any, mesh: Mesh, rules: Rules = RULES) -> list[str]:
    """What does not lie where its first rule says, because an axis does not divide it; for the start-up report."""
    lines = []
    for path, leaf in jax.tree.leaves_with_path(params):
        axes = logical_axes(_parts(path), leaf.ndim)
        spec = partition_spec(axes, leaf.shape, mesh, rules)
        for axis, size, placed in zip(axes, leaf.shape, spec, strict=True):
            entries = rules.get(axis or "", ())
            first = entries[0] if entries else ()
            if size % _parts_of(first, mesh) == 0:
                continue
            over = " x ".join(name for name in first if mesh.shape[name] > 1)
            placed = (placed,) if isinstance(placed, str) else placed or ()
            instead = " x ".join(name for name in placed if mesh.shape[name] > 1)
            where = f"is split by {instead} alone" if instead else "stays whole"
            lines.append(f"{axis}={size} {where}: not divisible by {over}")
    return sorted(set(lines))


def batch_sharding(mesh: Mesh, leading: int, rules: Rules = RULES) -> NamedSharding:
    """Of a batch whose sequences are dimension number `leading`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, rules["batch"][0]))


def batch_parts(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many equal parts the mesh splits a batch."""
    return _parts_of(rules["batch"][0], mesh)


def batch_share(mesh: Mesh, rules: Rules = RULES) -> tuple[int, int]:
    """(number, count): which of `count` equal stretches of every batch this process reads.

    Processes whose devices differ only along axes that do not split the batch read the same stretch.

    Raises:
      ConfigError: two processes would hold a part of the batch in common and another one each for itself.
    """
    parts = batch_parts(mesh, rules)
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh, 0, rules).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)  # type: ignore[attr-defined]
    stretches = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, stretches)) != parts or len(set(map(len, stretches))) != 1:
        wrong = f"splits a batch into {parts} parts, which {len(held)} processes cannot share equally"
        raise ConfigError(f"mesh: {wrong}; let tensor x context divide a process's devices, or be a multiple of them")
    return stretches.index(tuple(sorted(held[jax.process_index()]))), len(stretches)


def check_batch(key_name: str, batch_size: int, mesh: Mesh, rules: Rules = RULES) -> None:
    """Raise ConfigError unless the mesh can split this many sequences."""
    parts = batch_parts(mesh, rules)
    if batch_size % parts:
        right = f"must be a multiple of mesh {' x '.join(rules['batch'][0])} = {parts}"
        raise ConfigError(f"{key_name}: {batch_size} sequences at a time, {right}")


def check_sequence(seq_len: int, chunk: int | None, mesh: Mesh, tile: int, rules: Rules = RULES) -> None:
    """Raise ConfigError unless the mesh can split sequences of this length, in multiples of `tile` positions, and every
    chunk of the loss, by axes that split no other dimension of the same arrays."""
    axes = rules["seq"][0] if rules["seq"] else ()
    shards = _parts_of(axes, mesh)
    for name in ("batch", "heads", "kv_heads"):
        others = rules[name][0] if rules[name] else ()
        twice = [axis for axis in axes if axis in others and mesh.shape[axis] > 1]
        if twice:
            right = f"cannot split both a sequence and its {name}; name another axis in mesh.rules.seq or .{name}"
            raise ConfigError(f"mesh.{twice[0]}={mesh.shape[twice[0]]}: {right}")
    if shards > 1 and seq_len % (2 * shards * tile):
        right = f"must be a multiple of 2 x {' x '.join(axes)}" + f" x {tile}" * (tile > 1)
        raise ConfigError(f"train.seq_len={seq_len}: {right} = {2 * shards * tile}, to be split among {shards} devices")
    if chunk is not None and chunk % shards:
        raise ConfigError(f"train.loss_chunk={chunk}: must be a multiple of {' x '.join(axes)} = {shards}")


def check_experts(num_experts: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the mesh's expert axis can split this many experts."""
    size = mesh.shape["expert"]
    if size > 1 and (num_experts == 0 or num_experts % size):
        right = "a dense model has no experts to split" if num_experts == 0 else "must divide the number of experts"
        raise ConfigError(f"mesh.expert={size}: {right}, model.num_experts={num_experts}")
