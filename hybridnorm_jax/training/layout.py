"""On what mesh and in how many microbatches a run trains; a resumed run says where that is another than before."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.mesh.batch_shares import batch_parts
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.start_report import count_text

# The key of the layout in what a checkpoint says of its data.
LAYOUT = "layout"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the steps of a run are spread over devices.

    Attributes:
      mesh: axis -> size, of the axes that split something.
      devices, processes: how many there are.
      microbatches: of a step.
      sequences: of a microbatch, on one device.
    """

    mesh: dict[str, int]
    devices: int
    processes: int
    microbatches: int
    sequences: int

    def __str__(self) -> str:
        split = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items()) or "nothing is split"
        where = f"{count_text(self.devices, 'device')} in {count_text(self.processes, 'process')} ({split})"
        return f"{where}, {self.microbatches} x {self.sequences} sequences a device"


def layout_of(program: Program) -> Layout:
    """Of the steps of this program, in the processes of this run."""
    return Layout(
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        devices=program.mesh.size,
        processes=jax.process_count(),
        microbatches=program.microbatches.count,
        sequences=program.microbatches.size // batch_parts(program.mesh, program.rules),
    )


def say_changed_layout(saved: Mapping[str, Any], program: Program) -> None:
    """Print a line where a run goes on in another layout than that of the checkpoint, if the checkpoint says its own.

    Args:
      saved: what the checkpoint says of its data.
    """
    if LAYOUT not in saved:
        return
    before, now = Layout(**saved[LAYOUT]), layout_of(program)
    if before == now:
        return
    same = f"a step is the same {program.config.train.batch_size} sequences"
    if before.microbatches != now.microbatches and (changed := _changed_by_microbatches(program.config)):
        same += f", but {changed}"
    say(f"note: the run was on {before}; it goes on on {now}: {same}", file=sys.stderr)


def _changed_by_microbatches(config: RunConfig) -> str | None:
    """What is no sum over the tokens of a step, so that another number of microbatches gives other numbers; or None."""
    changed = []
    if config.model.num_experts and config.train.balance_loss:
        changed.append("the experts' balance loss is taken over each microbatch (train.balance_loss)")
    if config.model.dropout:
        changed.append("each microbatch draws its own dropout (model.dropout)")
    return " and ".join(changed) or None
