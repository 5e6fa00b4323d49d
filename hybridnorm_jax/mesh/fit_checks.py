"""Whether the mesh can split a batch, a sequence and the experts; each check raises ConfigError with the key."""

from jax.sharding import Mesh

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.batch_shares import batch_parts
from hybridnorm_jax.mesh.device_mesh import parts_of
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules, first_entry


def check_batch(key_name: str, batch_size: int, mesh: Mesh, rules: Rules = RULES) -> None:
    """Raise ConfigError unless the mesh can split this many sequences."""
    parts = batch_parts(mesh, rules)
    if batch_size % parts:
        right = f"must be a multiple of mesh {' x '.join(first_entry(rules, 'batch'))} = {parts}"
        raise ConfigError(f"{key_name}: {batch_size} sequences at a time, {right}")


def check_sequence(seq_len: int, chunk: int | None, mesh: Mesh, tile: int, rules: Rules = RULES) -> None:
    """Raise ConfigError unless the mesh can split sequences, and every chunk of the loss.

    Args:
      seq_len: positions of a sequence.
      chunk: positions of a chunk of the loss, None where the loss is computed whole.
      mesh: the mesh; its axes must not split another dimension of the same arrays as well.
      tile: what a device's half stretches must be multiples of.
      rules: what lies on which axis of the mesh.
    """
    axes = first_entry(rules, "seq")
    shards = parts_of(axes, mesh)
    for name in ("batch", "heads", "kv_heads"):
        for axis in axes:
            if axis in first_entry(rules, name) and mesh.shape[axis] > 1:
                right = f"cannot split both a sequence and its {name}; name another axis in mesh.rules.seq or .{name}"
                raise ConfigError(f"mesh.{axis}={mesh.shape[axis]}: {right}")
    joined = " x ".join(axes)
    if shards > 1 and seq_len % (2 * shards * tile):
        factors = f"2 x {joined}" if tile == 1 else f"2 x {joined} x {tile}"
        right = f"must be a multiple of {factors} = {2 * shards * tile}, to be split among {shards} devices"
        raise ConfigError(f"train.seq_len={seq_len}: {right}")
    if chunk is not None and chunk % shards:
        raise ConfigError(f"train.loss_chunk={chunk}: must be a multiple of {joined} = {shards}")


def check_experts(num_experts: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the mesh's expert axis can split this many experts."""
    size = mesh.shape["expert"]
    if size == 1:
        return
    if num_experts == 0:
        right = "a dense model has no experts to split"
    elif num_experts % size:
        right = "must divide the number of experts"
    else:
        return
    raise ConfigError(f"mesh.expert={size}: {right}, model.num_experts={num_experts}")
