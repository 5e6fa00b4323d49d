"""Keys as the architectures of several families state them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, Key, none

GELUS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
_GATED_NAMES = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "gelu_quick": "geglu_quick",
    "relu": "reglu",
    "relu_squared": "reglu_squared",
}
# The activation of a gated layer. The first word of each is written.
GATED = {theirs: _GATED_NAMES[ours] for theirs, ours in GELUS.items()}
LAYER_NORM: Mapping[str, Any] = {"norm": "layernorm", "norm_bias": True}
RMS_NORM: Mapping[str, Any] = {"norm": "rmsnorm", "norm_bias": False, "mlp_bias": False, "positions": "rope"}
MLP_BIAS = Key("mlp_bias", ("mlp_bias",), False)
TIED = Key("tie_word_embeddings", ("tie_embeddings",), True)
UNTIED = Key("tie_word_embeddings", ("tie_embeddings",), False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What absent keys mean in Llama or one of those after it."""

    vocab_size: int
    intermediate_size: int
    hidden_size: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None


def sizes(default: Sizes) -> tuple[Key, ...]:
    """The sizes of Llama and those after it."""
    return (
        Key("vocab_size", ("vocab_size",), default.vocab_size),
        Key("hidden_size", ("d_model",), default.hidden_size),
        Key("intermediate_size", ("mlp_dim",), default.intermediate_size),
        Key("num_hidden_layers", ("num_layers",), default.layers, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), default.heads),
        Key("num_key_value_heads", ("num_kv_heads",), default.kv_heads, null=none),
    )


def without(name: str, keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """The keys but the one of this name."""
    return tuple(key for key in keys if key.name != name)


def rms_norm_eps(default: float) -> Key:
    """rms_norm_eps."""
    return Key("rms_norm_eps", ("norm_eps",), default)


def layer_norm_eps(default: float = 1e-5) -> Key:
    """layer_norm_eps."""
    return Key("layer_norm_eps", ("norm_eps",), default)


def gated(name: str = "hidden_act", default: str = "silu") -> Key:
    """The activation of gated layers."""
    return Key(name, ("activation",), default, words=GATED)


def ungated(name: str, default: str) -> Key:
    """The activation of layers without a gate."""
    return Key(name, ("activation",), default, words=GELUS)


def attention_bias(*, default: bool = False) -> Key:
    """attention_bias, of all four projections."""
    return Key("attention_bias", ("attention_bias",), default)


HEAD_DIM_OR_NULL = Key("head_dim", ("head_dim",), None, null=none)
