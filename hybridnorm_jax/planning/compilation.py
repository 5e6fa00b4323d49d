"""From a RunConfig and a topology to what the compiler says about the train step."""

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hybridnorm_jax.command_line import parse
from hybridnorm_jax.config import ConfigError, UserError
from hybridnorm_jax.planning.collectives import Collectives, kernels, read_collectives
from hybridnorm_jax.planning.topologies import Topology, devices_of
from hybridnorm_jax.run_config import RunConfig
from hybridnorm_jax.sharding import batch_parts, check_batch, make_mesh
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import model_flops_per_token


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as XLA counts them; `aliased` are outputs that take the place of (donated) arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int

    @property
    def peak(self) -> int:
        """All that a step needs at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about one step of a run on a topology.

    Attributes:
      microbatch: sequences per device and microbatch.
      parameters, parameters_per_device: numbers, not bytes; the largest share of a device.
      state_bytes: of parameters and optimizer state on one device, from their shapes alone.
      memory: None where the compiler gave up for lack of it; `refusal` is then its own sentence.
      compiler_flops: of one device, see `report.FLOPS_NOTE`; None where it does not say.
      collectives: None where the compiled program cannot be read.
      fits: None where nobody can know, as for a GPU.
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
        """Of one step, on all devices together."""
        return self.model_flops_per_token * self.config.tokens_per_step

    @property
    def needed(self) -> int:
        """Bytes that one device must hold, as far as they are known: at least the state."""
        return self.state_bytes if self.memory is None else self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether it has room on a device."""
        if self.topology.is_simulated:
            return False if self.state_bytes > self.topology.hbm else None
        return self.memory is not None and self.memory.peak <= self.topology.hbm


def read_config(words: Sequence[str]) -> RunConfig:
    """What train.py would make of these words, but data.files may be missing: nothing is read from it."""
    try:
        return parse(words)
    except ConfigError as error:
        if not str(error).startswith("data.files=[]"):
            raise
    return parse([*words, "data.files=[not-read]"])


def plan(config: RunConfig, topology: Topology) -> Plan:
    """Compile the train step of this run for this topology.

    Raises:
      UserError: libtpu is missing, or the run does not go on this many devices.
    """
    program = Program(config, _mesh(config, topology))
    mesh, rules = program.mesh, program.rules
    check_batch("train.batch_size / train.grad_accumulation", config.microbatch_size, mesh, rules)
    params = jax.tree.leaves(program.abstract_state.params)
    lowered = program.lower_train_step()
    start = time.monotonic()
    compiled, text, refusal = _compile(lowered)
    seconds = time.monotonic() - start
    return Plan(
        config=config,
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        microbatch=config.microbatch_size // batch_parts(mesh, rules),
        parameters=sum(math.prod(leaf.shape) for leaf in params),
        parameters_per_device=sum(math.prod(_share(leaf)) for leaf in params),
        state_bytes=sum(
            math.prod(_share(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state)
        ),
        attention=program.backend,
        dispatch=program.dispatch,
        kernels=kernels(text) if text else [],
        memory=memory_of(compiled),
        refusal=refusal,
        compiler_flops=_flops(compiled),
        collectives=read_collectives(text) if text else None,
        compile_seconds=seconds,
    )


def _mesh(config: RunConfig, topology: Topology) -> Mesh:
    devices = devices_of(topology)
    try:
        return make_mesh(config.mesh.sizes, devices)
    except NotImplementedError as error:  # JAX's word for a torus that cannot be cut like this
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in config.mesh.sizes.items() if size != 1)
        right = "the size of each axis must be a product of sides of the slice"
        raise UserError(f"{asked} on {topology}: {right}") from error


def _share(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None, str | None]:
    """(executable, text of the compiled program, why there is no executable)."""
    # as_text() fails for a v5p ("async-update instruction should have 1 operands"), and there is none where memory does
    # not suffice: what the compiler itself writes down is there in both cases.
    with tempfile.TemporaryDirectory() as directory, _no_cache():
        refusal = compiled = None
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = re.sub(r"^RESOURCE_EXHAUSTED: (\w+: \w+: )?", "", str(error).splitlines()[0])
        written = sorted(Path(directory).glob("module_*jit_train_step*after_optimizations.txt"))
        return compiled, written[-1].read_text() if written else None, refusal


@contextlib.contextmanager
def _no_cache():
    """A program out of JAX's compilation cache would be written down by nobody."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def memory_of(compiled: Any) -> Memory | None:
    """What the compiler says of an executable, None where there is none.

    Raises:
      UserError: it says nothing.
    """
    if compiled is None:
        return None
    found = compiled.memory_analysis()
    if found is None:
        raise UserError("the compiler gives no memory analysis; another version of jaxlib or libtpu may")
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        generated_code=found.generated_code_size_in_bytes,
    )


def _flops(compiled: Any) -> float | None:
    analysis = None if compiled is None else compiled.cost_analysis()
    return analysis and analysis.get("flops")
