"""From a RunConfig and a topology to what the compiler says about the train step."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, UserError, first_line
from hybridnorm_jax.mesh.batch_shares import batch_parts
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.planning.collectives import Collectives, kernels
from hybridnorm_jax.planning.counts import Counts, count
from hybridnorm_jax.planning.overlap import Overlap, read_overlap
from hybridnorm_jax.planning.roofline import DATA_SHEETS, Roofline, Work, roofline
from hybridnorm_jax.planning.topologies import CHIPS, Topology, devices_of
from hybridnorm_jax.training.memory import Memory, bytes_per_device, compile_within_memory, elements_per_device
from hybridnorm_jax.training.remat_choice import compiled_program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about one step of a run on a topology.

    Attributes:
      mesh: axis -> its size.
      accumulation: microbatches of a step.
      microbatch: sequences per device and microbatch.
      parameters: how many numbers the model has.
      parameters_per_device: the largest share of them on one device.
      state_bytes: of parameters and optimizer state on one device, from their shapes alone.
      attention, dispatch: the backends that compute attention and experts; a dense model has no dispatch.
      kernels: names of the Pallas kernels.
      remat: what the backward pass computes again; with model.remat=auto what was chosen.
      memory: None where the compiler gave up for lack of memory.
      refusal: what the compiler said then, in its own words.
      counts: what one device does in a step; None where there is no compiled program to read.
      overlap: what runs beside the collectives of a GPU; None for other devices.
      compile_seconds: how long the compiler took, over all policies of remat that were tried.
    """

    config: RunConfig
    topology: Topology
    device_kind: str
    mesh: dict[str, int]
    accumulation: int
    microbatch: int
    parameters: int
    parameters_per_device: int
    state_bytes: int
    attention: str
    dispatch: str | None
    kernels: list[str]
    remat: str
    memory: Memory | None
    refusal: str | None
    counts: Counts | None
    overlap: Overlap | None
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
    def collectives(self) -> Collectives | None:
        """What is sent; None where there is no compiled program to read."""
        return None if self.counts is None else self.counts.collectives

    @property
    def roofline(self) -> Roofline | None:
        """Of a step on these devices; None where nothing is counted, or no data sheet known."""
        sheet = DATA_SHEETS.get(self.topology.kind)
        if sheet is None or self.counts is None:
            return None
        links = self.counts.collectives.links
        return roofline(Work(self.counts.flops, self.counts.memory, links.inside, links.between), sheet)

    @property
    def most_tokens_per_second(self) -> float | None:
        """An upper bound, on all devices together; None as for `roofline`."""
        found = self.roofline
        return None if found is None else self.config.tokens_per_step / found.least_seconds

    @property
    def most_mfu(self) -> float | None:
        """An upper bound of throughput.mfu; None as for `roofline`."""
        tokens = self.most_tokens_per_second
        if tokens is None:
            return None
        return mfu(tokens, self.model_flops_per_token, self.device_kind, self.topology.size)

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
      UserError: the compiler for it is missing or gives up, or the mesh or the batch of the run cannot be split over
        these devices.
    """
    seconds, text = 0.0, None

    def compile_step(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
        nonlocal seconds, text
        start = time.monotonic()
        compilation = _compile(lowered, dumped=topology.kind in CHIPS)
        seconds, text = seconds + time.monotonic() - start, compilation.text
        return compilation.executable, compilation.refusal

    mesh = make_mesh(config.mesh.sizes, devices_of(topology))
    compiled = compiled_program(config, mesh, room=topology.hbm, compile_step=compile_step)
    program, rules = compiled.program, compiled.program.rules
    state = program.abstract_state
    return Plan(
        config=config,
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        accumulation=program.microbatches.count,
        microbatch=program.microbatches.size // batch_parts(mesh, rules),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        parameters_per_device=elements_per_device(state.params),
        state_bytes=bytes_per_device(state),
        attention=program.backend,
        dispatch=program.dispatch,
        kernels=kernels(text) if text else [],
        remat=program.remat,
        memory=compiled.memory,
        refusal=compiled.refusal,
        counts=count(text, _nodes(mesh, topology)) if text else None,
        overlap=read_overlap(text) if text and topology.is_gpu and not topology.is_simulated else None,
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


def _nodes(mesh: jax.sharding.Mesh, topology: Topology) -> list[int]:
    """Of each device of the program, in its order, the number of its slice or node."""
    devices = mesh.devices.flat
    if topology.is_simulated:
        return [device.id // topology.shape[0] for device in devices]
    return [device.process_index if topology.is_gpu else getattr(device, "slice_index", 0) for device in devices]


def _compile(lowered: jax.stages.Lowered, *, dumped: bool) -> _Compilation:
    """Compile.

    Args:
      dumped: read the text from the file that the compiler writes. as_text() fails for a v5p ("async-update instruction
        should have 1 operands"), and there is no executable where memory does not suffice. The file is there in both
        cases.
    """
    with tempfile.TemporaryDirectory() as directory, _no_cache():
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True} if dumped else {}
        try:
            compiled, refusal = compile_within_memory(lowered, compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"the compiler gives up on this program: {shortened(first_line(error))}") from error
        written = sorted(Path(directory).glob("module_*jit_train_step*after_optimizations.txt"))
        if written:
            return _Compilation(executable=compiled, text=written[-1].read_text(), refusal=refusal)
    return _Compilation(executable=compiled, text=None if compiled is None else compiled.as_text(), refusal=refusal)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Turn JAX's compilation cache off: out of it the TPU compiler writes no file, and a GPU's program is not read."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether it is on
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
