"""Which parameters are matrices, and which of their axes are rows and columns."""

import math
from typing import Any, NamedTuple

from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.training.optimizers.groups import path_text

# A parameter holds one matrix for each layer of its run, and for each expert.
_BATCHES = ("layers", "experts")


class MatrixAxes(NamedTuple):
    """The axes of a parameter that holds matrices, in their order: first of the matrices, then of each.

    Attributes:
      batch: which say which matrix it is.
      inputs: whose channels a product with the matrix sums over; the embeddings' are the ids.
      outputs: whose channels it results in.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def of_matrix(self) -> tuple[int, ...]:
        """All axes of one matrix."""
        return self.inputs + self.outputs

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(input channels, output channels) of each matrix."""
        return math.prod(shape[axis] for axis in self.inputs), math.prod(shape[axis] for axis in self.outputs)


def matrix_axes(path: tuple[Any, ...], ndim: int) -> MatrixAxes | None:
    """The axes of a kernel or an embedding; None for any other parameter, such as a matrix inside of a norm."""
    names = tuple(path_text(path).split("/"))
    if names[-1] not in ("kernel", "embedding"):
        return None
    axes = logical_axes(names, ndim)
    begin = len(batch_axes(path, ndim))
    # What writes the stream has its width last; of anything else the first axis is read, and heads lie side by side.
    end = ndim - 1 if axes[-1] == "embed" else begin + 1
    return MatrixAxes(tuple(range(begin)), tuple(range(begin, end)), tuple(range(end, ndim)))


def batch_axes(path: tuple[Any, ...], ndim: int) -> tuple[int, ...]:
    """The first axes of a parameter that say of which layer and which expert its numbers are."""
    names = tuple(path_text(path).split("/"))
    axes = logical_axes(names, ndim)
    return tuple(axis for axis, name in enumerate(axes) if name in _BATCHES)
