"""FLOPs of the matrix products of a compiled program, counted in XLA's text of it: loops as often as they turn."""

import math
import re
from typing import NamedTuple

import numpy as np

from hybridnorm_jax.planning.executions import Execution, Loops, executions
from hybridnorm_jax.planning.hlo_text import Computation, Instruction, Module, arrays, parse_module
from hybridnorm_jax.planning.kernel_products import kernel_flops
from hybridnorm_jax.planning.model_parts import ModelParts


class Product(NamedTuple):
    """A matrix product, or a kernel that makes several.

    Attributes:
      name: of its instruction.
      part: of the model, one of model_parts.PARTS.
      flops: of one run, a multiplication and an addition as two; None: a kernel whose formula is not known.
      times: how often it runs.
      is_kernel: whether a kernel or a library computes it, counted by formula.
    """

    name: str
    part: str
    flops: int | None
    times: int
    is_kernel: bool


def matrix_products(text: str, *, unknown_trips: int = 1) -> list[Product]:
    """The matrix products of one execution of a compiled module, inside fusions and outside.

    Elementwise work, reductions and sorts do not count. All branches of a conditional count.

    Args:
      text: of the module after optimization.
      unknown_trips: how often a loop turns whose text does not say it.

    Raises:
      UserError: it cannot be read as the text of a module.
    """
    module = parse_module(text)
    parts = ModelParts(module)
    found = []
    for execution in executions(module, Loops(unknown_trips)):
        flops = _flops(execution, module)
        if flops != 0:
            instruction = execution.instruction
            is_kernel = instruction.opcode == "custom-call"
            found.append(Product(instruction.name, parts.of(execution), flops, execution.times, is_kernel))
    return found


def total_flops(products: list[Product]) -> int:
    """All known FLOPs together."""
    return sum((each.flops or 0) * each.times for each in products)


def _flops(execution: Execution, module: Module) -> int | None:
    """FLOPs of one run of an instruction; 0 where it multiplies nothing, None where that is not known."""
    instruction, computation = execution.instruction, module.computations[execution.place]
    match instruction.opcode:
        case "dot":
            return _dot(instruction, computation)
        case "convolution":
            return _convolution(instruction, computation)
        case "custom-call":
            flops = kernel_flops(instruction, computation)
            return 0 if flops is None and _calls_no_product(instruction, module) else flops
        case "ragged-dot":
            return None
    return 0


def _calls_no_product(call: Instruction, module: Module) -> bool:
    """Whether the text shows what a custom call computes, and that it multiplies nothing."""
    called = re.search(r"called_computations=\{([^}]*)\}", call.attributes)
    names = re.findall(r"[\w.\-]+", called[1]) if called else []
    inside = [each.opcode for name in names for each in module.computations[name].values()]
    return bool(inside) and not {"dot", "convolution", "custom-call", "fusion", "call", "while"} & set(inside)


def _sizes(name: str, computation: Computation) -> tuple[int, ...]:
    return arrays(computation[name].shape)[0].sizes


def _dot(dot: Instruction, computation: Computation) -> int:
    left = _sizes(dot.operand_names[0], computation)
    contracted = math.prod(left[dim] for dim in dot.numbers("lhs_contracting_dims"))
    return 2 * math.prod(arrays(dot.shape)[0].sizes) * contracted


def _convolution(convolution: Instruction, computation: Computation) -> int:
    """A TPU's products are convolutions, some of their dimensions windows that mostly lie on padding.

    2 * batch * input features * output features * pairs of a position and an element of the window on the input; groups
    divide the input features (feature groups) or the batch (batch groups).
    """
    left, right = (_sizes(name, computation) for name in convolution.operand_names)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels, convolution.name
    place, kernel_place, out_place = labels.groups()
    result = arrays(convolution.shape)[0].sizes
    feature_groups = int(convolution.attribute("feature_group_count") or 1)
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    count = left[place.index("b")] // batch_groups
    count *= left[place.index("f")] // feature_groups
    count *= right[kernel_place.index("o")]
    dimensions = sorted(set(place) - {"b", "f"})
    for number, dimension in enumerate(dimensions):
        window = _Window.of(convolution, number)
        count *= window.pairs(left[place.index(dimension)], result[out_place.index(dimension)])
    return 2 * count


class _Window(NamedTuple):
    """One dimension of a convolution's window."""

    size: int
    stride: int
    pad: int
    input_dilation: int
    dilation: int

    @classmethod
    def of(cls, convolution: Instruction, number: int) -> "_Window":
        """The window's dimension of this number."""
        written = re.search(r"window=\{([^}]*)\}", convolution.attributes)
        fields = dict(field.split("=") for field in written[1].split()) if written else {}

        def side(name: str, default: str) -> str:
            return fields[name].split("x")[number] if name in fields else default

        return cls(
            size=int(side("size", "1")),
            stride=int(side("stride", "1")),
            pad=int(side("pad", "0_0").split("_")[0]),
            input_dilation=int(side("lhs_dilate", "1")),
            dilation=int(side("rhs_dilate", "1")),
        )

    def pairs(self, size: int, result: int) -> int:
        """How many pairs of a position of the result and an element of the window meet an element of the input."""
        starts = np.arange(result) * self.stride - self.pad
        count, end = 0, (size - 1) * self.input_dilation
        for element in range(self.size):
            positions = starts + element * self.dilation
            meets = (positions >= 0) & (positions <= end) & (positions % self.input_dilation == 0)
            count += int(np.count_nonzero(meets))
        return count
