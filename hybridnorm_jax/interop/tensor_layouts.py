"""How one tensor of a Hugging Face checkpoint holds one leaf of our parameter tree, or several.

A layout gives *views* of their tensor, one for each leaf, whose numbers are in the order of the leaf's. Loading assigns
the views to the leaves, saving the leaves to the views. The axes of a view may be those of the leaf split further.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


class Layout:
    """How a tensor holds leaves."""

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """The shape of their tensor for leaves of these shapes."""
        raise NotImplementedError

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Of each leaf a view of their tensor: together every element once, none copied."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Matrix(Layout):
    """A matrix, or a vector, with the outputs of the leaves one leaf after another.

    Our leaf has shape (*inputs, *outputs); in their tensor the inputs are one axis and the outputs of all leaves
    another: a matrix, or a vector where there are no inputs.

    Attributes:
      inputs: how many leading axes of our leaf are inputs; 0 for a bias, a scale.
      transposed: their matrix is (out, in), not (in, out).
    """

    inputs: int = 0
    transposed: bool = False

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """(inputs, outputs of all leaves), or the other way round."""
        outputs = sum(math.prod(leaf[self.inputs :]) for leaf in leaves)
        if not self.inputs:
            return (outputs,)
        inputs = math.prod(leaves[0][: self.inputs])
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Of each leaf its outputs."""
        tensor = tensor.T if self.transposed else tensor
        ends = np.cumsum([math.prod(leaf[self.inputs :]) for leaf in leaves])
        parts = np.split(tensor, ends[:-1], axis=-1)
        return [part.reshape(leaf) for part, leaf in zip(parts, leaves, strict=True)]


@dataclasses.dataclass(frozen=True)
class GroupedHeads(Matrix):
    """A matrix, or a vector, with the heads of all leaves in groups: in each some heads of the first, of the second...

    There are as many groups as the leaf with the fewest heads has, so that each key has its own.
    """

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Of each leaf (*inputs, groups, heads in a group, head_dim)."""
        tensor = tensor.T if self.transposed else tensor
        heads = [leaf[self.inputs] for leaf in leaves]
        groups = min(heads)
        grid = tensor.reshape(*leaves[0][: self.inputs], groups, sum(heads) // groups, leaves[0][-1])
        ends = np.cumsum([count // groups for count in heads])
        return np.split(grid, ends[:-1], axis=-2)


@dataclasses.dataclass(frozen=True)
class Shards(Matrix):
    """A matrix, or a vector, in shards: in each a part of the outputs of every leaf, whose sizes are the same.

    Attributes:
      count: how many shards.
    """

    count: int = 1

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Of each leaf (*inputs, shards, outputs in a shard)."""
        tensor = tensor.T if self.transposed else tensor
        grid = tensor.reshape(*leaves[0][: self.inputs], self.count, len(leaves), -1)
        return [grid[..., number, :] for number in range(len(leaves))]


@dataclasses.dataclass(frozen=True)
class AsItIs(Layout):
    """Their tensor is our leaf, whatever its shape.

    Attributes:
      ones: how many axes of length 1 theirs has in front.
    """

    ones: int = 0

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """That of the leaf."""
        return (1,) * self.ones + leaves[0]

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """The tensor."""
        return [tensor.reshape(leaves[0])]


@dataclasses.dataclass(frozen=True)
class Alternating(Layout):
    """The last axes of the leaves, which are otherwise as they are, alternate number by number in theirs."""

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """That of a leaf, with the last axes of all together."""
        return (*leaves[0][:-1], sum(leaf[-1] for leaf in leaves))

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Of each leaf every so many-th number."""
        return [tensor[..., number :: len(leaves)] for number in range(len(leaves))]


@dataclasses.dataclass(frozen=True)
class Patches(Layout):
    """The kernel of a convolution (out, channels, height, width), which is (height, width, channels, out) with us."""

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """(out, channels, height, width)."""
        height, width, channels, out = leaves[0]
        return (out, channels, height, width)

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """The tensor with the axes in our order."""
        return [tensor.transpose(2, 3, 1, 0)]


VECTOR = Matrix()
TABLE = Matrix(inputs=1)
LINEAR = Matrix(inputs=1, transposed=True)
LINEAR_OUT = Matrix(inputs=2, transposed=True)  # heads and head_dim go in
CONV1D = Matrix(inputs=1)
CONV1D_OUT = Matrix(inputs=2)
LINEAR_GROUPED = GroupedHeads(inputs=1, transposed=True)
VECTOR_GROUPED = GroupedHeads()
AS_IT_IS = AsItIs()
ALTERNATING = Alternating()
PATCHES = Patches()


def in_halves(channels: np.ndarray, rotary_dim: int) -> np.ndarray:
    """A view of the leading `rotary_dim` channels of heads that rotate in pairs, as ours do in halves.

    Pair i is their channels 2i, 2i + 1, and our channels i, i + rotary_dim / 2.

    Args:
      channels: (..., head_dim), as theirs.

    Returns:
      (..., 2, rotary_dim / 2): our channels, the two halves apart.
    """
    rotating = channels[..., :rotary_dim]
    pairs = rotating.reshape(*rotating.shape[:-1], rotary_dim // 2, 2)
    return pairs.swapaxes(-1, -2)
