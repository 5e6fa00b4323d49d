"""What a step needs on one device: of its state from shapes alone, of all of it from the compiler."""

import dataclasses
import math
import re
from typing import Any

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.xla_options import readable_refusals

SIZES = "model.d_model, model.num_layers, model.mlp_dim, model.vocab_size, train.batch_size and train.seq_len"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as XLA counts them; `aliased` are outputs that take the place of (donated) arguments.

    Attributes:
      stated_peak: the most that is held at once, as the compiler states it; None where it does not.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int
    stated_peak: int | None = None

    @property
    def sum(self) -> int:
        """All together: too much where not all of it is held at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code

    @property
    def peak(self) -> int:
        """What a step needs at once: what the compiler states, or else the sum."""
        return self.sum if self.stated_peak is None else self.stated_peak


def memory_of(compiled: jax.stages.Compiled, platform: str) -> Memory:
    """What the compiler says of an executable.

    Args:
      platform: that it is compiled for. The peak that XLA states for a CPU leaves the temporaries out; it is not taken.

    Raises:
      UserError: it says nothing.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise UserError("the compiler gives no memory analysis; another version of jaxlib or libtpu may")
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        generated_code=found.generated_code_size_in_bytes,
        stated_peak=None if platform == "cpu" else getattr(found, "peak_memory_in_bytes", 0) or None,
    )


def compile_within_memory(lowered: jax.stages.Lowered, **options: Any) -> tuple[jax.stages.Compiled | None, str | None]:
    """(executable, None), or (None, what the compiler says of the memory it lacks); `options` of Lowered.compile."""
    try:
        with readable_refusals():
            return lowered.compile(**options), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, re.sub(r"^RESOURCE_EXHAUSTED: (\w+: \w+: )?", "", str(error).splitlines()[0])


def elements_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings; where devices hold shares of different size, the largest."""
    return sum(map(_elements, jax.tree.leaves(tree)))


def bytes_per_device(tree: Any) -> int:
    """As elements_per_device, in bytes."""
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _elements(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


@dataclasses.dataclass(frozen=True)
class LeastBytes:
    """What a step needs on one device at the very least: the state, and of each microbatch what backward reads again.

    Attributes:
      state: parameters and optimizer state.
      activations: the input of every block, which each policy of model.remat keeps, and the logits of one chunk.
      runs: how many runs these are of, which are trained at once.
    """

    state: int
    activations: int
    runs: int = 1


def least_bytes(config: RunConfig, abstract_state: Any, *, microbatch: int, runs: int = 1) -> LeastBytes:
    """Of a run, from shapes alone; the activations as if they were split over all devices, as no mesh splits more.

    Args:
      abstract_state: abstract arrays with shardings, of one run.
      microbatch: sequences at a time, over all devices.
      runs: how many are trained at once.
    """
    model, train = config.model, config.train
    streams = train.seq_len * model.d_model * model.num_layers
    logits = (train.loss_chunk or train.seq_len) * model.vocab_size
    numbers = microbatch * (streams + logits)
    return LeastBytes(
        state=runs * bytes_per_device(abstract_state),
        activations=runs * numbers * jax.numpy.dtype(model.dtype).itemsize // jax.device_count(),
        runs=runs,
    )


def check_room(least: LeastBytes, room: int | None) -> None:
    """Raise UserError where the least that a step needs is more than a device has, before anything is made.

    A machine that swaps answers to nothing for minutes, and an operating system that runs out of memory kills.
    """
    if room is None or least.state + least.activations <= room:
        return
    state, activations, there = (f"{size / 2**30:,.1f} GiB" for size in (least.state, least.activations, room))
    step, right = "a step", "lower"
    if least.runs > 1:
        step, right = f"a step of {least.runs} runs", "lower together,"
    raise UserError(
        f"{step} needs at least {state} of parameters and optimizer state and {activations} of activations on each "
        f"device, which has {there}; {right} one of {SIZES}, raise train.grad_accumulation, or use more devices"
    )
