"""What a step needs on one device: of its state from shapes alone, of all of it from the compiler."""

import dataclasses
import math
import re
from typing import Any

import jax

from hybridnorm_jax.errors import UserError


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


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says of an executable.

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
    )


def compile_within_memory(lowered: jax.stages.Lowered, **options: Any) -> tuple[jax.stages.Compiled | None, str | None]:
    """(executable, None), or (None, what the compiler says of the memory it lacks); `options` of Lowered.compile."""
    try:
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
