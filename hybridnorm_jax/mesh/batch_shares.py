"""How the mesh splits a batch, and which part of it each process reads."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.device_mesh import parts_of
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules


class BatchShare(NamedTuple):
    """Stretch `number`, from 0, of `count` equal stretches of every batch."""

    number: int
    count: int


WHOLE_BATCH = BatchShare(number=0, count=1)


def batch_sharding(mesh: Mesh, leading: int, rules: Rules = RULES) -> NamedSharding:
    """Of a batch whose sequences are dimension number `leading`."""
    (axes,) = rules["batch"]
    unsplit = [None] * leading
    return NamedSharding(mesh, PartitionSpec(*unsplit, axes))


def batch_parts(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many equal parts the mesh splits a batch."""
    (axes,) = rules["batch"]
    return parts_of(axes, mesh)


def batch_share(mesh: Mesh, rules: Rules = RULES) -> BatchShare:
    """The stretch of every batch that this process reads.

    Processes whose devices differ only along axes that do not split the batch read the same stretch.

    Raises:
      ConfigError: two processes would hold a part of the batch in common and another one each for itself.
    """
    parts = batch_parts(mesh, rules)
    held_by: dict[int, set[int]] = {}  # process -> the parts that its devices hold
    for device, (rows,) in batch_sharding(mesh, 0, rules).devices_indices_map((parts,)).items():
        held_by.setdefault(device.process_index, set()).add(rows.start or 0)
    stretches = sorted({tuple(sorted(held)) for held in held_by.values()})
    lengths = [len(stretch) for stretch in stretches]
    if sum(lengths) != parts or len(set(lengths)) != 1:
        wrong = f"splits a batch into {parts} parts, which {len(held_by)} processes cannot share equally"
        raise ConfigError(f"mesh: {wrong}; let tensor x context divide a process's devices, or be a multiple of them")
    own = tuple(sorted(held_by[jax.process_index()]))
    return BatchShare(number=stretches.index(own), count=len(stretches))
