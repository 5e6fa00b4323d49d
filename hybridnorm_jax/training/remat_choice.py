"""model.remat=auto: of the policies with which a train step fits the device, the one that computes least again."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import check
from hybridnorm_jax.mesh.device_room import room_of
from hybridnorm_jax.mesh.fit_checks import check_batch
from hybridnorm_jax.model.config import AUTO_REMAT
from hybridnorm_jax.training.memory import Memory, compile_within_memory, memory_of
from hybridnorm_jax.training.program import Program

# What computes least again comes first, and keeps most.
ORDER = ("none", "dots", "dots_no_batch", "all_but_attention", "full")
# Of the device's memory; the rest is for evaluation's batches and for what a compiler cannot foresee.
SHARE = 0.95

Compile = Callable[[jax.stages.Lowered], tuple[jax.stages.Compiled | None, str | None]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and its compiled train step.

    Attributes:
      executable: None where memory does not suffice; `refusal` then says why.
      memory: what the step needs; None where there is no executable.
    """

    program: Program
    executable: jax.stages.Compiled | None
    refusal: str | None
    memory: Memory | None


def compiled_program(
    config: RunConfig, mesh: Mesh | None = None, *, room: int | None, compile_step: Compile = compile_within_memory
) -> Compiled:
    """The program of a run with its train step, compiled for every policy that has to be tried.

    With model.remat=auto that is each of ORDER, until one needs at most SHARE of the room. Where none does, it is the
    last one, which keeps least.

    Args:
      room: bytes of a device; None: unknown.

    Raises:
      ConfigError: as Program; the batch cannot be split over the mesh; or the policy is to be chosen, and the room is
        unknown.
    """
    is_open = config.model.remat == AUTO_REMAT
    right = "this device does not say how much memory it has; name a policy"
    check(not is_open or room is not None, "model.remat", AUTO_REMAT, right)
    for policy in ORDER if is_open else (config.model.remat,):
        program = _checked(Program(config, mesh, remat=policy))
        executable, refusal = compile_step(program.lower_train_step())
        memory = None if executable is None else memory_of(executable, program.platform)
        if is_open and room is not None and memory is not None and memory.peak <= SHARE * room:
            break
    return Compiled(program, executable, refusal, memory)


def checked_program(config: RunConfig) -> Program:
    """The program of a run on the devices at hand. Nothing is compiled; model.remat=auto is still open.

    Raises:
      ConfigError: as Program, or the batch cannot be split over the mesh.
    """
    return _checked(Program(config))


def with_chosen_remat(program: Program) -> Program:
    """The program to train with: the same one, or where model.remat=auto the one with the policy that is chosen.

    All processes take the same policy: the one for the device with the least room.

    Raises:
      ConfigError: the policy is to be chosen, and the room is unknown.
    """
    if program.remat != AUTO_REMAT:
        return program
    return compiled_program(program.config, program.mesh, room=least_room()).program


def least_room() -> int | None:
    """Bytes of the device that has least, of those of all processes; None: unknown."""
    rooms = [room_of(device) for device in jax.local_devices()]
    least = None if None in rooms else min(rooms)
    if jax.process_count() > 1:
        # A process that does not know says 0, so that no process waits for it.
        least = int(multihost_utils.process_allgather(np.int64(least or 0)).min()) or None
    return least


def _checked(program: Program) -> Program:
    """The program, if its batches can be split over its mesh."""
    microbatch = program.microbatches.size
    check_batch("train.batch_size / train.grad_accumulation", microbatch, program.mesh, program.rules)
    return program
