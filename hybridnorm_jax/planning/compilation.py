"""From a RunConfig and a topology to what the compiler says about the train step."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.batch_shares import batch_parts
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.fit_checks import check_batch
from hybridnorm_jax.planning.collectives import Collectives, kernels, read_collectives
from hybridnorm_jax.planning.topologies import Topology, devices_of
from hybridnorm_jax.training.memory import (
    Memory,
    bytes_per_device,
    compile_within_memory,
    elements_per_device,
    memory_of,
)
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import model_flops_per_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about one step of a run on a topology.

    Attributes:
      mesh: axis -> its size.
      microbatch: sequences per device and microbatch.
      parameters: how many numbers the model has.
      parameters_per_device: the largest share of them on one device.
      state_bytes: of parameters and optimizer state on one device, from their shapes alone.
      attention, dispatch: the backends that compute attention and experts; a dense model has no dispatch.
      kernels: names of the Pallas kernels.
      memory: None where the compiler gave up for lack of memory.
      refusal: what the compiler said then, in its own words.
      compiler_flops: of one device, see plan_report.FLOPS_NOTE; None where the compiler does not say.
      collectives: None where there is no compiled program to read.
      compile_seconds: how long the compiler took.
    """

    config: RunConfig
    topology: Topology
    device_kind: str
    mesh: dict[str, int]
    microbatch: int
    parameters: int
    parameters_per_device: int
    state_bytes: int
    attention: str
    dispatch: str | None
    kernels: list[str]
    memory: Memory | None
    refusal: str | None
    compiler_flops: float | None
    collectives: Collectives | None
    compile_seconds: float

    @property
    def model_flops_per_token(self) -> float:
        """See training.throughput.model_flops_per_token."""
        return model_flops_per_token(self.config.model, self.config.train.seq_len)

    @property
    def model_flops(self) -> float:
        """FLOPs of one step, on all devices together."""
        return self.model_flops_per_token * self.config.tokens_per_step

    @property
    def needed(self) -> int:
        """Bytes that one device must hold; where the compiler gave up, those of the state alone."""
        return self.state_bytes if self.memory is None else self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether a device has room for it; None where that cannot be known, as for a GPU."""
        if self.topology.is_simulated:
            return False if self.state_bytes > self.topology.hbm else None
        return self.memory is not None and self.memory.peak <= self.topology.hbm


def read_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration that `hybridnorm train` would read from these arguments; data.files may be missing.

    Raises:
      ConfigError: as config.arguments.parse.
    """
    try:
        return parse(arguments)
    except ConfigError as error:
        if not str(error).startswith("data.files=[]"):
            raise
    return parse([*arguments, "data.files=[not-read]"])  # a plan reads no data


def plan(config: RunConfig, topology: Topology) -> Plan:
    """Compile the train step of this run for this topology.

    Raises:
      UserError: libtpu is missing, or the mesh or the batch of the run cannot be split over this many devices.
    """
    program = Program(config, make_mesh(config.mesh.sizes, devices_of(topology)))
    mesh, rules = program.mesh, program.rules
    check_batch("train.batch_size / train.grad_accumulation", config.microbatch_size, mesh, rules)
    state = program.abstract_state
    lowered = program.lower_train_step()
    start = time.monotonic()
    compilation = _compile(lowered)
    seconds = time.monotonic() - start
    compiled, text = compilation.executable, compilation.text
    return Plan(
        config=config,
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        microbatch=config.microbatch_size // batch_parts(mesh, rules),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        parameters_per_device=elements_per_device(state.params),
        state_bytes=bytes_per_device(state),
        attention=program.backend,
        dispatch=program.dispatch,
        kernels=kernels(text) if text else [],
        memory=None if compiled is None else memory_of(compiled),
        refusal=compilation.refusal,
        compiler_flops=_flops(compiled),
        collectives=read_collectives(text) if text else None,
        compile_seconds=seconds,
    )


class _Compilation(NamedTuple):
    """What came of a compilation.

    Attributes:
      executable: None where memory does not suffice; `refusal` then says why.
      text: of the optimized program; None where the compiler wrote none.
    """

    executable: jax.stages.Compiled | None
    text: str | None
    refusal: str | None


def _compile(lowered: jax.stages.Lowered) -> _Compilation:
    # as_text() fails for a v5p ("async-update instruction should have 1 operands"), and there is no executable where
    # memory does not suffice. The file that the compiler writes is there in both cases.
    with tempfile.TemporaryDirectory() as directory, _no_cache():
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        compiled, refusal = compile_within_memory(lowered, compiler_options=options)
        written = sorted(Path(directory).glob("module_*jit_train_step*after_optimizations.txt"))
        text = written[-1].read_text() if written else None
    return _Compilation(executable=compiled, text=text, refusal=refusal)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Turn JAX's compilation cache off: for a program out of it, the compiler would write no file."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _flops(compiled: jax.stages.Compiled | None) -> float | None:
    analysis = None if compiled is None else compiled.cost_analysis()
    return analysis.get("flops") if analysis else None
