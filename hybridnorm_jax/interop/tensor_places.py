"""How tensors of a Hugging Face checkpoint hold leaves of our parameter tree, whatever the architecture.

A Layout gives *views* of their tensor in the shapes of our leaves, so loading assigns the views to the leaves and
saving assigns the leaves to the views. Which tensors an architecture has is in tensors.py.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig

Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor of theirs holds one leaf of ours, or several that differ in their output axes only.

    Our leaf has shape (*inputs, *outputs); in their tensor the inputs are one axis and the outputs of all leaves
    another: a matrix, or a vector where there are no inputs.

    Attributes:
      inputs: how many leading axes of our leaf are inputs; 0 for a bias, a scale.
      transposed: their matrix is (out, in), not (in, out).
      per_head: head by head the outputs of every leaf in turn, (heads, leaves, head_dim), not one leaf after another.
      as_it_is: their tensor is our leaf, whatever its shape.
    """

    inputs: int = 0
    transposed: bool = False
    per_head: bool = False
    as_it_is: bool = False

    def shape(self, leaves: Sequence[Shape]) -> Shape:
        """The shape of their tensor for leaves of these shapes."""
        if self.as_it_is:
            return leaves[0]
        outputs = sum(math.prod(leaf[self.inputs :]) for leaf in leaves)
        if not self.inputs:
            return (outputs,)
        inputs = math.prod(leaves[0][: self.inputs])
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def views(self, tensor: np.ndarray, leaves: Sequence[Shape]) -> list[np.ndarray]:
        """Views of their tensor in the shapes of the leaves: together every element once, none copied."""
        if self.as_it_is:
            return [tensor]
        tensor = tensor.T if self.transposed else tensor
        if self.per_head:
            heads = leaves[0][self.inputs]
            grid = tensor.reshape(*leaves[0][: self.inputs], heads, len(leaves), -1)
            return [grid[..., number, :] for number in range(len(leaves))]
        ends = np.cumsum([math.prod(leaf[self.inputs :]) for leaf in leaves])
        parts = np.split(tensor, ends[:-1], axis=-1)
        return [part.reshape(leaf) for part, leaf in zip(parts, leaves, strict=True)]


VECTOR = Layout()
TABLE = Layout(inputs=1)
LINEAR = Layout(inputs=1, transposed=True)
LINEAR_OUT = Layout(inputs=2, transposed=True)  # heads and head_dim go in
CONV1D = Layout(inputs=1)
CONV1D_OUT = Layout(inputs=2)
LINEAR_PER_HEAD = Layout(inputs=1, transposed=True, per_head=True)
VECTOR_PER_HEAD = Layout(per_head=True)
AS_IT_IS = Layout(as_it_is=True)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Their tensor `name`, the leaves of ours that it holds, in its order, and how it holds them.

    A name with {} is that of one tensor per expert. {} stands for the expert, whose slice of the leaves it holds.
    """

    name: str
    leaves: tuple[str, ...]
    layout: Layout

    def of_experts(self, experts: int) -> Iterator["_NamedTensor"]:
        """The tensors that this stands for: one, or one for each expert."""
        if "{}" not in self.name:
            yield _NamedTensor(self.name, expert=())
            return
        for expert in range(experts):
            yield _NamedTensor(self.name.format(expert), expert=(expert,))


class _NamedTensor(NamedTuple):
    """A tensor's name, and the index of its expert, () of a tensor that is no expert's."""

    name: str
    expert: Index


class LeafSlice(NamedTuple):
    """What a tensor holds of a leaf.

    Attributes:
      path: of the leaf in our tree, "/" between its keys.
      index: in the stacked leaf: () outside runs, (layer of the run,), or (layer of the run, expert).
      shape: of what the tensor holds, without the axes of the index.
    """

    path: str
    index: Index
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Place:
    """A Tensor of one model.

    Attributes:
      name: of their tensor, in full.
      slices: what it holds of our leaves.
      layout: how it holds them.
    """

    name: str
    slices: tuple[LeafSlice, ...]
    layout: Layout

    @property
    def shape(self) -> Shape:
        """The shape of their tensor."""
        return self.layout.shape([piece.shape for piece in self.slices])

    @property
    def size(self) -> int:
        """How many numbers their tensor holds."""
        return math.prod(self.shape)

    def views(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Views of their tensor in the shapes of what it holds."""
        return self.layout.views(tensor, [piece.shape for piece in self.slices])

    def targets(self, tree: Mapping[str, Any]) -> list[Any]:
        """What the tensor holds of the leaves in a tree by path; views where the leaves are NumPy's."""
        return [tree[piece.path][piece.index] for piece in self.slices]


class _Group(NamedTuple):
    """The tensors of one block, or those outside the blocks.

    Attributes:
      tensors: names and leaves without what stands before them.
      theirs: stands before their names.
      ours: stands before our leaves' paths.
      layer: index of the layer in its run, () outside.
    """

    tensors: tuple[Tensor, ...]
    theirs: str
    ours: str
    layer: Index

    def leaves_present(self, tensor: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Path and shape of the leaves that one of these tensors holds; empty where the model has none of them.

        Args:
          shapes: of all leaves of the model, by path.

        Raises:
          UserError: the model has only some of them.
        """
        paths = [self.ours + leaf for leaf in tensor.leaves]
        present = {path: shapes[path] for path in paths if path in shapes}
        if present and len(present) < len(paths):
            raise UserError(f"{self.theirs}{tensor.name}: the model has only part of {', '.join(paths)}")
        return present

    def places(self, tensor: Tensor, leaves: Mapping[str, Shape], experts: int) -> Iterator[Place]:
        """Where one of these tensors, or that of every expert, holds these leaves."""
        for name, expert in tensor.of_experts(experts):
            index = self.layer + expert
            slices = [LeafSlice(path, index, shape=shape[len(index) :]) for path, shape in leaves.items()]
            yield Place(self.theirs + name, tuple(slices), tensor.layout)


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """The tensors of an architecture.

    Attributes:
      prefix: of the names of all tensors but the head's; files of the bare model lack it.
      outer: the tensors outside the blocks, the largest first.
      block: the tensors of a layer; names without `layer`, leaves without `run_<i>`.
      layer: what stands before a block's names, with {} for the layer.
      head: name of the head's matrix, which files of tied models may hold as well.
      buffers: regular expression of names, without the prefix, that hold no parameters.
    """

    prefix: str
    outer: tuple[Tensor, ...]
    block: tuple[Tensor, ...]
    layer: str
    head: str
    buffers: str

    def full_name(self, name: str) -> str:
        """A name with the prefix that files of the bare model lack."""
        return name if name.startswith((self.prefix, self.head.split(".")[0] + ".")) else self.prefix + name

    def is_buffer(self, name: str) -> bool:
        """Whether the tensor of this full name holds no parameters."""
        return re.fullmatch(self.buffers, name.removeprefix(self.prefix)) is not None

    def places(self, config: ModelConfig) -> Iterator[Place]:
        """The tensors that a model of this config has.

        Raises:
          UserError: the model has a leaf that no tensor of this table holds, or half of those that one holds.
        """
        shapes = leaf_shapes(config)
        left = set(shapes)
        for group, tensor in self._tensors(config):
            leaves = group.leaves_present(tensor, shapes)
            left.difference_update(leaves)
            if leaves:
                yield from group.places(tensor, leaves, config.num_experts)
        for path in shapes:
            if path in left:
                raise UserError(f"{path}: this architecture has no tensor for this parameter of the model")

    def _tensors(self, config: ModelConfig) -> Iterator[tuple[_Group, Tensor]]:
        for group in self._groups(config):
            for tensor in group.tensors:
                yield group, tensor

    def _groups(self, config: ModelConfig) -> Iterator[_Group]:
        yield _Group(self.outer, theirs="", ours="", layer=())
        for number, run in enumerate(config.runs):
            for layer in range(run.length):
                theirs = self.layer.format(run.start + layer)
                yield _Group(self.block, theirs=theirs, ours=f"run_{number}/", layer=(layer,))


def leaf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the parameters of `Decoder(config)` by path, "/" between the keys."""
    # Dtypes do not matter for shapes, but float64 would warn without jax_enable_x64.
    params = abstract_params(dataclasses.replace(config, param_dtype="float32", dtype="float32"))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
