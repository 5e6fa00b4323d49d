"""How tensors of a Hugging Face checkpoint hold leaves of our parameter tree, whatever the architecture.

Which tensors an architecture has is in architectures/, how one tensor holds leaves in tensor_layouts.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.tensor_layouts import Layout, Shape, in_halves
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Their tensor `name`, the leaves of ours that it holds, in its order, and how it holds them.

    A name with {} is that of one tensor for each index of the leaves' first axis, such as one per expert or per head.
    {} stands for the index, whose slice of the leaves it holds.

    Attributes:
      paired: those of the leaves whose rotating channels are next to each other in theirs (in_halves).
      when: of which models the tensor is; None: of all that have its leaves.
    """

    name: str
    leaves: tuple[str, ...]
    layout: Layout
    paired: tuple[str, ...] = ()
    when: Callable[[ModelConfig], bool] | None = None

    def numbered(self, count: int) -> Iterator["_NamedTensor"]:
        """The tensors that this stands for: one, or so many."""
        if "{}" not in self.name:
            yield _NamedTensor(self.name, index=())
            return
        for number in range(count):
            yield _NamedTensor(self.name.format(number), index=(number,))


class _NamedTensor(NamedTuple):
    """A tensor's name, and its index in the leaves' first axis, () where it holds all of it."""

    name: str
    index: Index


class LeafSlice(NamedTuple):
    """What a tensor holds of a leaf.

    Attributes:
      path: of the leaf in our tree, "/" between its keys.
      index: in the stacked leaf: () outside runs, (layer of the run,), or (layer of the run, expert or head).
      shape: of what the tensor holds, without the axes of the index.
      paired_channels: how many leading channels of a head are paired next to each other in theirs; see in_halves.
      head_dim: width of such a head; the last axis of the leaf is one head, or all of them.
    """

    path: str
    index: Index
    shape: Shape
    paired_channels: int = 0
    head_dim: int = 1


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

    def read(self, tensor: np.ndarray, leaves: Sequence[np.ndarray]) -> None:
        """Assign what their tensor holds to our leaves, of which `leaves` are the slices, contiguous."""
        for view, leaf, piece in self._views(tensor, leaves):
            if piece.paired_channels == 0:
                leaf.reshape(view.shape)[...] = view
            else:
                heads = _heads(leaf, piece.head_dim)
                halves, rest = _parts(heads, piece.paired_channels)
                theirs = np.ascontiguousarray(view).reshape(heads.shape)
                halves[...] = in_halves(theirs, piece.paired_channels)
                rest[...] = theirs[..., piece.paired_channels :]

    def write(self, tensor: np.ndarray, leaves: Sequence[np.ndarray]) -> None:
        """Assign our leaves, of which `leaves` are the slices, to their tensor."""
        for view, leaf, piece in self._views(tensor, leaves):
            if piece.paired_channels == 0:
                view[...] = leaf.reshape(view.shape)
            else:
                heads = _heads(leaf, piece.head_dim)
                halves, rest = _parts(heads, piece.paired_channels)
                theirs = np.empty_like(heads)
                in_halves(theirs, piece.paired_channels)[...] = halves
                theirs[..., piece.paired_channels :] = rest
                view[...] = theirs.reshape(view.shape)

    def _views(
        self, tensor: np.ndarray, leaves: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, LeafSlice]]:
        """Of each leaf: the view of their tensor, the slice of ours, and what it is."""
        views = self.layout.views(tensor, [piece.shape for piece in self.slices])
        yield from zip(views, leaves, self.slices, strict=True)

    def targets(self, tree: Mapping[str, Any]) -> list[Any]:
        """What the tensor holds of the leaves in a tree by path; views where the leaves are NumPy's."""
        return [tree[piece.path][piece.index] for piece in self.slices]


def _heads(leaf: np.ndarray, head_dim: int) -> np.ndarray:
    """A view of a leaf, contiguous, as (..., heads, head_dim)."""
    return leaf.reshape(*leaf.shape[:-1], -1, head_dim)


def _parts(leaf: np.ndarray, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of a leaf: the channels that rotate, as (..., 2, rotary_dim / 2), and the others."""
    rotating = leaf[..., :rotary_dim]
    return rotating.reshape(*rotating.shape[:-1], 2, rotary_dim // 2), leaf[..., rotary_dim:]


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

    def places(self, tensor: Tensor, leaves: Mapping[str, Shape], config: ModelConfig) -> Iterator[Place]:
        """Where one of these tensors, or each of those that it stands for, holds these leaves."""
        pairs = {self.ours + leaf: config.rotary_width for leaf in tensor.paired}
        first = next(iter(leaves.values()))[len(self.layer) :]
        for name, number in tensor.numbered(first[0] if first else 0):
            index = self.layer + number
            slices = [
                LeafSlice(path, index, shape[len(index) :], pairs.get(path, 0), config.head_dim)
                for path, shape in leaves.items()
            ]
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
      older_prefix: of the names of all tensors in files of earlier versions of transformers.
    """

    prefix: str
    outer: tuple[Tensor, ...]
    block: tuple[Tensor, ...]
    layer: str
    head: str
    buffers: str
    older_prefix: str = ""

    def full_name(self, name: str) -> str:
        """A name with the prefix that files of the bare model lack."""
        name = name.removeprefix(self.older_prefix)
        heads = [tensor.name for tensor in self.outer if not tensor.name.startswith(self.prefix)]
        starts = [self.prefix, *(f"{head.partition('.')[0]}." for head in (self.head, *heads))]
        return name if name.startswith(tuple(starts)) else self.prefix + name

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
            if tensor.when is not None and not tensor.when(config):
                continue
            leaves = group.leaves_present(tensor, shapes)
            left.difference_update(leaves)
            if leaves:
                yield from group.places(tensor, leaves, config)
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
