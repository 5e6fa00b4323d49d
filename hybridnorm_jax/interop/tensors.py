"""Which tensor of a Hugging Face checkpoint holds which leaves of our parameter tree, and how.

One table per architecture serves both directions: a Layout gives *views* of their tensor in the shapes of our leaves,
so loading assigns the views to the leaves and saving assigns the leaves to the views. A new architecture is one more
entry of TABLES here and one of ARCHITECTURES in architectures.py.
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
from hybridnorm_jax.model.placement import HEAD_NORMS, runs

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
        for number, run in enumerate(runs(config.placements)):
            for layer in range(run.length):
                theirs = self.layer.format(run.start + layer)
                yield _Group(self.block, theirs=theirs, ours=f"run_{number}/", layer=(layer,))


def leaf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the parameters of `Decoder(config)` by path, "/" between the keys."""
    # Dtypes do not matter for shapes, but float64 would warn without jax_enable_x64.
    params = abstract_params(dataclasses.replace(config, param_dtype="float32", dtype="float32"))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _dense(name: str, *leaves: str, kernel: Layout = LINEAR, bias: Layout = VECTOR) -> tuple[Tensor, ...]:
    """A linear layer and its bias; which of the two a model has, its config says."""
    return (
        Tensor(f"{name}.weight", tuple(f"{leaf}/kernel" for leaf in leaves), kernel),
        Tensor(f"{name}.bias", tuple(f"{leaf}/bias" for leaf in leaves), bias),
    )


def _norm(name: str, leaf: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", (f"{leaf}/scale",), VECTOR), Tensor(f"{name}.bias", (f"{leaf}/bias",), VECTOR)


def _embedding(name: str, leaf: str = "token_embedding") -> tuple[Tensor, ...]:
    return (Tensor(f"{name}.weight", (f"{leaf}/embedding",), TABLE),)


_QUERY, _KEY, _VALUE = "attention/query", "attention/key", "attention/value"
_SEPARATE_QKV = (
    *_dense("self_attn.q_proj", _QUERY),
    *_dense("self_attn.k_proj", _KEY),
    *_dense("self_attn.v_proj", _VALUE),
)
_Q_K_NORMS = (*_norm("self_attn.q_norm", "attention/q_norm"), *_norm("self_attn.k_norm", "attention/k_norm"))
_LLAMA_ATTENTION = (*_SEPARATE_QKV, *_dense("self_attn.o_proj", "attention/out", kernel=LINEAR_OUT))
_LLAMA_BRANCHES = (
    *_LLAMA_ATTENTION,
    *_dense("mlp.gate_proj", "feed_forward/gate"),
    *_dense("mlp.up_proj", "feed_forward/up"),
    *_dense("mlp.down_proj", "feed_forward/down"),
)
_ATTENTION_NORM, _FEED_FORWARD_NORM = "attention_pre_norm", "feed_forward_pre_norm"
_LLAMA_PRE_NORMS = (
    *_norm("input_layernorm", _ATTENTION_NORM),
    *_norm("post_attention_layernorm", _FEED_FORWARD_NORM),
)
_LLAMA = TensorTable(
    prefix="model.",
    outer=(*_embedding("model.embed_tokens"), *_dense("lm_head", "head"), *_norm("model.norm", "final_norm")),
    block=_LLAMA_PRE_NORMS + _LLAMA_BRANCHES,
    layer="model.layers.{}.",
    head="lm_head.weight",
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
_OLMO2_BRANCH_NORMS = (
    *_norm("post_attention_layernorm", "attention_branch_norm"),
    *_norm("post_feedforward_layernorm", "feed_forward_branch_norm"),
)
_OLMOE_EXPERTS = (
    *_dense("mlp.gate", "feed_forward/router"),
    *_dense("mlp.experts.{}.gate_proj", "feed_forward/expert_gate"),
    *_dense("mlp.experts.{}.up_proj", "feed_forward/expert_up"),
    *_dense("mlp.experts.{}.down_proj", "feed_forward/expert_down"),
)

_GPT2 = TensorTable(
    prefix="transformer.",
    outer=(
        *_embedding("transformer.wte"),
        *_embedding("transformer.wpe", "position_embedding"),
        *_dense("lm_head", "head"),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    block=(
        *_norm("ln_1", _ATTENTION_NORM),
        *_norm("ln_2", _FEED_FORWARD_NORM),
        *_dense("attn.c_attn", _QUERY, _KEY, _VALUE, kernel=CONV1D),
        *_dense("attn.c_proj", "attention/out", kernel=CONV1D_OUT),
        *_dense("mlp.c_fc", "feed_forward/up", kernel=CONV1D),
        *_dense("mlp.c_proj", "feed_forward/down", kernel=CONV1D),
    ),
    layer="transformer.h.{}.",
    head="lm_head.weight",
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
)
_GPT_NEOX = TensorTable(
    prefix="gpt_neox.",
    outer=(
        *_embedding("gpt_neox.embed_in"),
        *_dense("embed_out", "head"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
    ),
    block=(
        *_LLAMA_PRE_NORMS,
        *_dense("attention.query_key_value", _QUERY, _KEY, _VALUE, kernel=LINEAR_PER_HEAD, bias=VECTOR_PER_HEAD),
        *_dense("attention.dense", "attention/out", kernel=LINEAR_OUT),
        *_dense("mlp.dense_h_to_4h", "feed_forward/up"),
        *_dense("mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    layer="gpt_neox.layers.{}.",
    head="embed_out.weight",
    buffers=r"(layers\.\d+\.attention\.)?(bias|masked_bias|rotary_emb\.inv_freq)",
)
_OPT = TensorTable(
    prefix="model.",
    outer=(
        *_embedding("model.decoder.embed_tokens"),
        *_embedding("model.decoder.embed_positions", "position_embedding"),
        *_dense("lm_head", "head"),
        *_norm("model.decoder.final_layer_norm", "final_norm"),
    ),
    block=(
        *_norm("self_attn_layer_norm", _ATTENTION_NORM),
        *_norm("final_layer_norm", _FEED_FORWARD_NORM),
        *_SEPARATE_QKV,
        *_dense("self_attn.out_proj", "attention/out", kernel=LINEAR_OUT),
        *_dense("fc1", "feed_forward/up"),
        *_dense("fc2", "feed_forward/down"),
    ),
    layer="model.decoder.layers.{}.",
    head="lm_head.weight",
    buffers=r"(?!)",
)

# Of our own code, in pytorch/. Norms have our names, projections those of Llama.
_HYBRIDNORM_NORMS = tuple(
    tensor
    for sublayer in ("attention", "feed_forward")
    for which in ("pre", "branch", "post")
    for tensor in _norm(f"{sublayer}_{which}_norm", f"{sublayer}_{which}_norm")
)
_HYBRIDNORM_EXPERTS = tuple(
    Tensor(f"mlp.experts.{name}_{theirs}", (f"feed_forward/expert_{name}/{ours}",), AS_IT_IS)
    for name in ("gate", "up", "down")
    for theirs, ours in (("proj", "kernel"), ("bias", "bias"))
)
_HYBRIDNORM = TensorTable(
    prefix="model.",
    outer=(
        *_embedding("model.embed_tokens"),
        *_dense("lm_head", "head"),
        *_embedding("model.embed_positions", "position_embedding"),
        *_norm("model.embedding_norm", "embedding_norm"),
        *_norm("model.norm", "final_norm"),
    ),
    block=(
        *_HYBRIDNORM_NORMS,
        *_LLAMA_BRANCHES,
        *(tensor for name in HEAD_NORMS for tensor in _norm(f"self_attn.{name}", f"attention/{name}")),
        *_dense("mlp.router", "feed_forward/router"),
        Tensor("mlp.balance_bias", ("feed_forward/balance_bias",), VECTOR),
        *_HYBRIDNORM_EXPERTS,
        *_dense("mlp.shared.gate_proj", "feed_forward/shared/gate"),
        *_dense("mlp.shared.up_proj", "feed_forward/shared/up"),
        *_dense("mlp.shared.down_proj", "feed_forward/shared/down"),
    ),
    layer="model.layers.{}.",
    head="lm_head.weight",
    buffers=r"(?!)",
)

TABLES: Mapping[str, TensorTable] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "llama": _LLAMA,
    "qwen3": dataclasses.replace(_LLAMA, block=_LLAMA_PRE_NORMS + _LLAMA_BRANCHES + _Q_K_NORMS),
    "olmo2": dataclasses.replace(_LLAMA, block=_LLAMA_BRANCHES + _Q_K_NORMS + _OLMO2_BRANCH_NORMS),
    "olmoe": dataclasses.replace(_LLAMA, block=_LLAMA_PRE_NORMS + _LLAMA_ATTENTION + _Q_K_NORMS + _OLMOE_EXPERTS),
    "hybridnorm": _HYBRIDNORM,
}
