"""The tensors that architectures have in common: a linear layer, a norm, an embedding, attention as Llama names it."""

import dataclasses
from collections.abc import Callable

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR, LINEAR_OUT, PATCHES, TABLE, VECTOR, Layout
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.placement import HEAD_NORMS, HIDDEN_NORMS

QUERY, KEY, VALUE, OUT = "attention/query", "attention/key", "attention/value", "attention/out"
GATE, UP, DOWN = "feed_forward/gate", "feed_forward/up", "feed_forward/down"
ATTENTION_NORM, FEED_FORWARD_NORM = "attention_pre_norm", "feed_forward_pre_norm"
NO_BUFFERS = r"(?!)"
# Leaves whose channels rotate: pairs may be next to each other in them.
_ROTATING = (QUERY, KEY, "attention/q_norm", "attention/k_norm")


def dense(
    name: str, *leaves: str, kernel: Layout = LINEAR, bias: Layout = VECTOR, paired: bool = False
) -> tuple[Tensor, ...]:
    """A linear layer and its bias; which of the two a model has, its config says.

    Args:
      name: of their layer.
      leaves: our layers, in the order in which theirs holds them.
      kernel, bias: how it does.
      paired: channels that rotate together are next to each other.
    """
    return (
        _tensor(f"{name}.weight", [f"{leaf}/kernel" for leaf in leaves], kernel, paired),
        _tensor(f"{name}.bias", [f"{leaf}/bias" for leaf in leaves], bias, paired),
    )


def _tensor(name: str, leaves: list[str], layout: Layout, paired: bool) -> Tensor:
    rotating = [leaf for leaf in leaves if paired and leaf.rpartition("/")[0] in _ROTATING]
    return Tensor(name, tuple(leaves), layout, paired=tuple(rotating))


def norm(name: str, leaf: str, *, layout: Layout = VECTOR, paired: bool = False) -> tuple[Tensor, ...]:
    """A norm's scale and bias; which of the two a model has, its config says."""
    return (
        _tensor(f"{name}.weight", [f"{leaf}/scale"], layout, paired),
        _tensor(f"{name}.bias", [f"{leaf}/bias"], layout, paired),
    )


def embedding(name: str, leaf: str = "token_embedding") -> tuple[Tensor, ...]:
    """A table of embeddings."""
    return (Tensor(f"{name}.weight", (f"{leaf}/embedding",), TABLE),)


def separate_qkv(name: str = "self_attn", *, paired: bool = False) -> tuple[Tensor, ...]:
    """q_proj, k_proj and v_proj."""
    return (
        *dense(f"{name}.q_proj", QUERY, paired=paired),
        *dense(f"{name}.k_proj", KEY, paired=paired),
        *dense(f"{name}.v_proj", VALUE),
    )


def attention(*, out: str = "o_proj", paired: bool = False) -> tuple[Tensor, ...]:
    """The projections of attention, as Llama names them."""
    return (*separate_qkv(paired=paired), *dense(f"self_attn.{out}", OUT, kernel=LINEAR_OUT))


def q_k_norms(q: str = "q_norm", k: str = "k_norm") -> tuple[Tensor, ...]:
    """Norms of q and k inside attention."""
    return (*norm(f"self_attn.{q}", "attention/q_norm"), *norm(f"self_attn.{k}", "attention/k_norm"))


def pre_norms(first: str = "input_layernorm", second: str = "post_attention_layernorm") -> tuple[Tensor, ...]:
    """The norms at the entrance of the two branches."""
    return (*norm(first, ATTENTION_NORM), *norm(second, FEED_FORWARD_NORM))


def plain_mlp(up: str, down: str) -> tuple[Tensor, ...]:
    """A feed-forward layer without a gate."""
    return (*dense(up, UP), *dense(down, DOWN))


def only(when: Callable[[ModelConfig], bool], *tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors, of which those models alone have any."""
    return tuple(dataclasses.replace(tensor, when=when) for tensor in tensors)


GATED_MLP = (*dense("mlp.gate_proj", GATE), *dense("mlp.up_proj", UP), *dense("mlp.down_proj", DOWN))
FUSED_GATED_MLP = (*dense("mlp.gate_up_proj", GATE, UP), *dense("mlp.down_proj", DOWN))


def experts(name: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """Experts with a tensor for each matrix of each; {} in the name stands for the expert."""
    return (
        *dense(f"{name}.{gate}", "feed_forward/expert_gate"),
        *dense(f"{name}.{up}", "feed_forward/expert_up"),
        *dense(f"{name}.{down}", "feed_forward/expert_down"),
    )


def llama_table(*block: tuple[Tensor, ...], norm_name: str = "model.norm") -> TensorTable:
    """The tensors of a model that names what is outside its blocks as Llama does, with these in each block."""
    return TensorTable(
        prefix="model.",
        outer=(*embedding("model.embed_tokens"), *dense("lm_head", "head"), *norm(norm_name, "final_norm")),
        block=tuple(tensor for part in block for tensor in part),
        layer="model.layers.{}.",
        head="lm_head.weight",
        buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    )


# ---- Our own code, in pytorch/. Norms have our names, projections those of Llama.

# The kinds of norms that it has, and what norms of any of them have besides scale and bias.
EXPORTED_NORMS = tuple(name for name, kind in NORM_KINDS.items() if not kind.is_plugin)
_OF_KINDS = tuple(dict.fromkeys(name for kind in EXPORTED_NORMS for name in NORM_KINDS[kind].parameter_names))


def _own_norm(name: str, leaf: str, *, layout: Layout = VECTOR) -> tuple[Tensor, ...]:
    """A norm of any kind that our code has."""
    return (
        *norm(name, leaf, layout=layout),
        *(Tensor(f"{name}.{own}", (f"{leaf}/{own}",), AS_IT_IS) for own in _OF_KINDS),
    )


_OWN_NORMS = tuple(
    tensor
    for sublayer in ("attention", "feed_forward")
    for which in ("pre", "branch", "post", "entry", "side", "own")
    for tensor in _own_norm(f"{sublayer}_{which}_norm", f"{sublayer}_{which}_norm")
)
_OWN_STREAMS = tuple(
    tensor for which in ("main_norm", "side_norm") for tensor in _own_norm(f"model.streams.{which}", f"streams/{which}")
)
_OWN_EXPERTS = tuple(
    Tensor(f"mlp.experts.{name}_{theirs}", (f"feed_forward/expert_{name}/{ours}",), AS_IT_IS)
    for name in ("gate", "up", "down")
    for theirs, ours in (("proj", "kernel"), ("bias", "bias"))
)
_OWN_BLOCK = (
    *_OWN_NORMS,
    *attention(),
    *GATED_MLP,
    *(part for name in HEAD_NORMS for part in _own_norm(f"self_attn.{name}", f"attention/{name}", layout=AS_IT_IS)),
    *(part for name in HIDDEN_NORMS for part in _own_norm(f"mlp.{name}", f"feed_forward/{name}")),
    Tensor("self_attn.head_scales.weight", ("attention/head_scales/scale",), VECTOR),
    Tensor("self_attn.qk_scale.weight", ("attention/qk_scale/scale",), AS_IT_IS),
    Tensor("mlp.gate_scale.weight", ("feed_forward/gate_scale/scale",), VECTOR),
    Tensor("mlp.up_scale.weight", ("feed_forward/up_scale/scale",), VECTOR),
    Tensor("self_attn.sinks", ("attention/sinks",), AS_IT_IS),
    *dense("mlp.router", "feed_forward/router"),
    Tensor("mlp.balance_bias", ("feed_forward/balance_bias",), VECTOR),
    *_OWN_EXPERTS,
    *dense("mlp.shared.gate_proj", "feed_forward/shared/gate"),
    *dense("mlp.shared.up_proj", "feed_forward/shared/up"),
    *dense("mlp.shared.down_proj", "feed_forward/shared/down"),
    *dense("mlp.shared_gate", "feed_forward/shared_gate"),
    *(
        Tensor(f"{sublayer}_{which}.weight", (f"{sublayer}_{which}/scale",), VECTOR)
        for sublayer in ("attention", "feed_forward")
        for which in ("layer_scale", "residual_vector", "own_vector")
    ),
)
_LOGIT_SCALES = Tensor("logit_scales.weight", ("head/scales/scale",), AS_IT_IS)
HYBRIDNORM = TensorTable(
    prefix="model.",
    outer=(
        *embedding("model.embed_tokens"),
        *dense("lm_head", "head"),
        _LOGIT_SCALES,
        *embedding("model.embed_positions", "position_embedding"),
        Tensor("model.embedding_scale.weight", ("embedding_scale/scale",), VECTOR),
        *_own_norm("model.embedding_norm", "embedding_norm"),
        *_own_norm("model.norm", "final_norm"),
        *_OWN_STREAMS,
    ),
    block=_OWN_BLOCK,
    layer="model.layers.{}.",
    head="lm_head.weight",
    buffers=NO_BUFFERS,
)

_OWN_POOLING = tuple(
    tensor
    for theirs, ours in (
        ("q_proj", "attention/query"),
        ("k_proj", "attention/key"),
        ("v_proj", "attention/value"),
        ("mlp.gate_proj", "feed_forward/gate"),
        ("mlp.up_proj", "feed_forward/up"),
        ("mlp.down_proj", "feed_forward/down"),
    )
    for tensor in dense(f"model.pooling.{theirs}", f"pooling/{ours}")
)
HYBRIDNORM_ENCODER = TensorTable(
    prefix="model.",
    outer=(
        *embedding("model.embed_tokens"),
        *dense("classifier", "head"),
        _LOGIT_SCALES,
        *dense("distillation_classifier", "distillation_head"),
        Tensor("distillation_scales.weight", ("distillation_head/scales/scale",), AS_IT_IS),
        *dense("model.embed_patches", "patch_embedding", kernel=PATCHES),
        *embedding("model.embed_positions", "position_embedding"),
        *(
            Tensor(f"model.{name}.weight", (f"{name}/embedding",), AS_IT_IS)
            for name in ("class_token", "distillation_token", "register_tokens", "mask_token")
        ),
        *_own_norm("model.embedding_norm", "embedding_norm"),
        *_own_norm("model.norm", "final_norm"),
        *_OWN_STREAMS,
        *_OWN_POOLING,
        *dense("model.pooling.o_proj", "pooling/attention/out", kernel=LINEAR_OUT),
        *norm("model.pooling.norm", "pooling/norm"),
        Tensor("model.pooling.probe.weight", ("pooling/probe/embedding",), AS_IT_IS),
    ),
    block=_OWN_BLOCK,
    layer="model.layers.{}.",
    head="classifier.weight",
    buffers=NO_BUFFERS,
)
