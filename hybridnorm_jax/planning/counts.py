"""All that is counted in a compiled train step, on one device, each by part of the model."""

import dataclasses
from collections.abc import Sequence

from hybridnorm_jax.planning.collectives import Collectives, read_collectives
from hybridnorm_jax.planning.executions import Loops, executions
from hybridnorm_jax.planning.hlo_text import parse_module
from hybridnorm_jax.planning.matrix_products import matrix_products
from hybridnorm_jax.planning.memory_traffic import memory_traffic
from hybridnorm_jax.planning.model_parts import by_part


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does in one step.

    Attributes:
      product_flops: part -> FLOPs of the matrix products in the text.
      kernel_flops: part -> FLOPs of kernels and library calls, by formula.
      memory_bytes: part -> bytes read and written, see memory_traffic.py.
      sent_bytes: part -> bytes that have to go over links, inside and between slices or nodes.
      collectives: what is sent by kind.
      unknown_kernels: names of kernels without a formula, whose FLOPs are missing.
      unknown_loops: names of loops that do not say how often they turn, and count once.
      balanced_loops: names of loops that turn as often as the data ask for, and count as where the load is balanced.
    """

    product_flops: dict[str, int]
    kernel_flops: dict[str, int]
    memory_bytes: dict[str, int]
    sent_bytes: dict[str, int]
    collectives: Collectives
    unknown_kernels: list[str]
    unknown_loops: list[str]
    balanced_loops: list[str]

    @property
    def flops(self) -> int:
        """Of all parts, kernels included."""
        return sum(self.product_flops.values()) + sum(self.kernel_flops.values())

    @property
    def memory(self) -> int:
        """Bytes that all parts read and write."""
        return sum(self.memory_bytes.values())


def count(text: str, nodes: Sequence[int]) -> Counts:
    """Count a compiled module.

    Args:
      text: of the module after optimization.
      nodes: of each device of the program, the number of its slice or node.

    Raises:
      UserError: it cannot be read as the text of a module.
    """
    products = matrix_products(text)
    collectives = read_collectives(text, nodes)
    loops = Loops()
    for _ in executions(parse_module(text), loops):
        pass
    return Counts(
        product_flops=by_part((each.part, (each.flops or 0) * each.times) for each in products if not each.is_kernel),
        kernel_flops=by_part((each.part, (each.flops or 0) * each.times) for each in products if each.is_kernel),
        memory_bytes=by_part((each.part, each.bytes * each.times) for each in memory_traffic(text)),
        sent_bytes=by_part((each.part, round(sum(each.links) * each.times)) for each in collectives.sent),
        collectives=collectives,
        unknown_kernels=sorted({each.name for each in products if each.flops is None}),
        unknown_loops=sorted(set(loops.unknown)),
        balanced_loops=sorted(set(loops.balanced)),
    )
