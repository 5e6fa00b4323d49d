"""Models as our own PyTorch code has them, and what our Decoder makes of the same parameters."""

import functools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

# transformers copies the code of a directory to a folder of its own and imports it from there.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import hybridnorm_jax as hn  # noqa: E402
from hybridnorm_jax.interop.huggingface import save_huggingface  # noqa: E402
from hybridnorm_jax.interop.own_architecture import OWN  # noqa: E402
from hybridnorm_jax.interop.tensor_places import leaf_shapes  # noqa: E402
from hybridnorm_jax.model.abstract_params import abstract_params  # noqa: E402
from tests.schemes import keys_of, stored_scale  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES = {"d_model": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61}
BIASES = {"attention_bias": True, "mlp_bias": True, "head_bias": True}
EXPERTS = {"num_experts": 5, "experts_per_token": 2}
# Of a rotation made for texts of 8 tokens.
STRETCHED = {"rope_factor": 4.0, "rope_original_length": 8, "rope_theta": 50.0}
LONG_FACTORS = {"rope_short_factors": (1.0, 1.25, 1.5, 2.0), "rope_long_factors": (1.0, 2.5, 3.5, 4.0)}
# Of norms that have numbers or matrices of their own, at every place where a norm stands.
KINDS_OF_NORMS = {
    "dyt": {
        **{"scheme": "peri", "norm": "dyt", "norm_bias": True, "learned_embedding_scale": True, "mlp_bias": True},
        **{"positions": "learned", "max_positions": 20, "tie_embeddings": True, "activation": "gelu"},
    },
    "dyt_as_llama": {"scheme": "pre", "norm": "dyt", "learned_embedding_scale": True},
    # With scores that differ: the gradient of alpha of the keys would else be little but rounding.
    "derf": {
        **{"scheme": "hybrid_star", "norm": "derf", "norm_bias": True, "attention_norm_per_head": True},
        "init_std": 0.3,
    },
    "derf_in_two_streams": {"scheme": "siamese_attn_norm", "norm": "derf", "norm_scale_plus_one": True},
    "bhyt": {"scheme": "simple_norm", "norm": "bhyt", "norm_eps": 1e-3},
    "bhyt_with_experts": {"scheme": "pre_qkvc_post", "norm": "bhyt", "num_experts": 5, "experts_per_token": 2},
    "gated": {"scheme": "keel", "norm": "gated", "norm_bias": True, "learned_embedding_scale": True},
    "gated_without_scale": {"scheme": "normformer", "norm": "gated", "norm_scale": False, "attention_norm": "derf"},
}
COMPRESSED = {"norm": "crmsnorm", "d_model": 31, "norm_width": 32, "head_dim": 8}
# Every kind of model beside those that differ in the scheme alone.
KINDS = {
    "experts": {"scheme": "hybrid_star", **EXPERTS},
    "experts_with_all": {
        **{"scheme": "span", **EXPERTS, **BIASES, "norm_bias": True, "shared_experts": 2},
        **{"balance_bias": True, "normalize_expert_weights": True},
    },
    "layernorm": {"scheme": "peri", "norm": "layernorm", "norm_bias": True, **BIASES, "activation": "gelu"},
    **KINDS_OF_NORMS,
    "layernorm_without_bias": {"scheme": "pre", "norm": "layernorm", "activation": "gelu_tanh"},
    "norms_without_scale": {"scheme": "hybrid", "norm": "layernorm", "norm_scale": False, "activation": "relu"},
    "crmsnorm": {"scheme": "pre", **COMPRESSED},
    "crmsnorm_padded": {"scheme": "pre", **COMPRESSED, "d_model": 40},
    "crmsnorm_with_experts": {"scheme": "pre", **COMPRESSED, **EXPERTS, "mlp_dim": 45},
    "centred": {
        **{"scheme": "pre", "norm_scale": False, "outer_norm_scale": True, "outer_norm_bias": True},
        **{"embedding_norm": "true", "positions": "learned", "max_positions": 20, "embedding_centring": True},
    },
    "compressed_within": {
        **{"scheme": "pre", **COMPRESSED, "norm_scale": False, "outer_norm_scale": True, "outer_norm_bias": True},
        **{"whole_outside": True, "embedding_centring": True, "embedding_norm": "true", "d_model": 40},
        **{"positions": "sinusoidal", "max_positions": 20, "tie_embeddings": True},
    },
    "learned_positions": {
        **{"scheme": "pre_qk_projection", "positions": "learned", "max_positions": 20, "position_offset": 2},
        "tie_embeddings": True,
    },
    "partial_rotation": {"scheme": "keel", "rotary_dim": 4, "rope_theta": 500.0},
    "tied_with_bias": {"scheme": "parallel", "tie_embeddings": True, "head_bias": True},
    "every_head_its_own": {"scheme": "pre_qkvc_post", "num_kv_heads": 4, "attention_norm": "layernorm"},
    "biased_head_norms": {"scheme": "pre_qkc_post", "attention_norm": "layernorm", "attention_norm_bias": True},
    "one_kv_head": {"scheme": "reordered", "num_kv_heads": 1, "head_dim": 12, "norm_eps": 1e-2},
    "embedding_norm": {"scheme": "b2t", "embedding_norm": "true"},
    # Parts that other people's architectures have.
    "biases_of_readers_alone": {
        **{"scheme": "pre", "attention_bias": True, "attention_output_bias": False},
        **{"mlp_bias": True, "mlp_output_bias": False},
    },
    "biases_of_writers_alone": {"scheme": "pre", "attention_output_bias": True, "mlp_output_bias": True},
    "score_scale_and_cap": {"scheme": "sandwich", "attention_scale": 0.6, "score_cap": 1.5},
    "sinks_and_windows": {"scheme": "pre", "attention_sinks": True, "windows": (3, 0), "attention_bias": True},
    "windows": {"scheme": "hybrid_star", "windows": (5, 3, 0)},
    "clipped": {"scheme": "pre_qk_pre", "qkv_clip": 0.2},
    "norms_of_each_head": {
        **{"scheme": "pre_qk_pre", "attention_norm": "layernorm"},
        **{"attention_norm_bias": True, "attention_norm_per_head": True},
    },
    "scales_from_zero": {"scheme": "sandwich", "norm_scale_plus_one": True, "activation": "geglu_tanh"},
    "scales_from_zero_with_layernorm": {
        **{"scheme": "pre_qkvc_pre", "norm": "layernorm", "norm_bias": True},
        **{"norm_scale_plus_one": True, "activation": "relu_squared"},
    },
    "multipliers": {
        **{"scheme": "pre", "embedding_scale": 5.5, "branch_multiplier": 0.25},
        **{"logit_scale": 0.7, "logit_cap": 1.25, "tie_embeddings": True},
    },
    "layer_scale": {"scheme": "sandwich", "layer_scale": True},
    "one_norm_for_both": {"scheme": "parallel_one_norm", "norm": "layernorm", "norm_bias": True, **BIASES},
    "one_norm_for_both_qk": {"scheme": "parallel_one_norm_qk", "activation": "silu"},
    "two_norms_qk": {"scheme": "parallel_qk", "attention_norm_per_head": True, "activation": "gelu_quick"},
    "sandwich_qk": {"scheme": "sandwich_qk", "activation": "reglu_squared"},
    "dense_among_sparse": {
        **{"scheme": "pre", **EXPERTS, "dense_layers": (0, 2), "dense_mlp_dim": 40},
        **{"shared_experts": 1, "shared_mlp_dim": 24, "shared_expert_gate": True, "router_bias": True},
        **{"shared_expert_gate_bias": True},
    },
    "clamped_experts": {
        **{"scheme": "pre", **EXPERTS, "activation": "swiglu_clamped", "clamp_limit": 0.3, "clamp_alpha": 1.5},
        **{"mlp_bias": True, "normalize_expert_weights": True},
    },
    "clamped": {"scheme": "pre", "activation": "swiglu_clamped", "clamp_limit": 0.3},
    "geglu": {"scheme": "pre", "activation": "geglu"},
    "geglu_quick": {"scheme": "pre", "activation": "geglu_quick"},
    "reglu": {"scheme": "pre", "activation": "reglu"},
    "alibi": {"scheme": "pre", "positions": "alibi"},
    "alibi_of_six_heads": {
        **{"scheme": "parallel", "positions": "alibi", "num_heads": 6, "num_kv_heads": 6, "head_dim": 8},
        **{"alibi_max": 6.0, "alibi_scale": 0.5},
    },
    "alibi_rounded": {"scheme": "pre", "positions": "alibi", "alibi_bfloat16": True, "windows": (5, 0)},
    "sinusoids": {"scheme": "pre", "positions": "sinusoidal", "max_positions": 20, "position_offset": 2},
    "no_rotation_in_some": {"scheme": "pre", "rope_layers": (1, 1, 0), "windows": (4, 4, 0)},
    "two_rotations": {
        **{"scheme": "reordered", "rope_layers": (2, 1), "second_rope_theta": 500.0},
        **{"rope_scaling": "linear", "rope_factor": 4.0},
    },
    "llama3_rotation": {"scheme": "pre", **STRETCHED, "rope_scaling": "llama3", "rope_bounds": (1.0, 4.0)},
    "yarn": {"scheme": "pre", **STRETCHED, "rope_scaling": "yarn", "rope_bounds": (1.0, 2.0)},
    "yarn_as_gpt_oss": {
        **{"scheme": "pre", **STRETCHED, "rope_scaling": "yarn", "rope_bounds": (1.0, 2.0)},
        **{"rope_truncate": False, "rope_attention_factor": 1.25},
    },
    # Every text is longer: one that is cached may not become so.
    "longrope": {
        **{"scheme": "pre", "rope_scaling": "longrope", **STRETCHED, **LONG_FACTORS, "rope_original_length": 2},
    },
    "longrope_of_short_texts": {
        **{"scheme": "pre", "rope_scaling": "longrope", **STRETCHED, **LONG_FACTORS, "rope_original_length": 100},
    },
}

# What the numbers of norms start at, by their names; None: of matrices.
OF_KINDS = {own.name: own.start for kind in hn.NORM_KINDS.values() for own in kind.parameters}
TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)
# Models whose caches, masks and files differ; tests that take longer take these.
SOME = (
    "hybrid_star",
    "span",
    "experts_with_all",
    "learned_positions",
    "crmsnorm_padded",
    "compressed_within",
    "sinks_and_windows",
    "score_scale_and_cap",
    "alibi_rounded",
    "alibi_of_six_heads",
    "no_rotation_in_some",
    "longrope",
    "dense_among_sparse",
    "one_norm_for_both",
    "dyt",
    "derf",
    "gated",
)


def config_of(name, **keys):
    """The model of a name of KINDS, or of a scheme."""
    return hn.ModelConfig(**(SIZES | (KINDS[name] if name in KINDS else keys_of(name)) | keys))


def draw(config, seed=0):
    """Parameters of about the size that training starts with, no two norms alike."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        centre, width = (0.0, config.init_std)
        if path[-1].key == "scale":
            centre = stored_scale(path, config)
            width = 0.3 * centre
        if path[0].key == "embedding_scale":
            centre = config.d_model**0.5
        if path[-1].key in OF_KINDS:
            start = OF_KINDS[path[-1].key]
            centre, width = (0.0, shape.shape[-2] ** -0.5) if start is None else (start, 0.2)
        drawn = (centre + width * rng.standard_normal(shape.shape)).astype(shape.dtype)
        if config.norm_width is not None and config.norm_width - 1 < config.d_model:
            drawn = _without_padding(drawn, config)
        return drawn

    return jax.tree.map_with_path(leaf, abstract_params(config))


def _without_padding(leaf, config):
    """Zero where a leaf would write into the padding of the stream."""
    if leaf.shape[-1] == config.d_model:
        leaf[..., config.norm_width - 1 :] = 0
    return leaf


class Exported(NamedTuple):
    """A model on both sides."""

    config: hn.ModelConfig
    params: dict
    directory: Path


def export(directory, config, params=None, **keys):
    """The model, written to a new directory as our own code."""
    params = draw(config) if params is None else params
    save_huggingface(directory, config, params, architecture="hybridnorm", **keys)
    return Exported(config, params, Path(directory))


def in_torch(directory, **keys):
    """The model of a directory, as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **keys)
    assert not model.training
    return model


def ids(tokens):
    """Token ids as torch wants them."""
    return torch.tensor(np.asarray(tokens), dtype=torch.long)


@functools.lru_cache
def compiled(config):
    """(params, tokens) -> ((loss, logits), gradients), the loss that of every next token."""

    def loss(params, tokens):
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jax.numpy.take_along_axis(log_p, tokens[:, 1:, None], -1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def as_leaves(config, tensors):
    """Tensors of our PyTorch code by name, as the leaves of our tree by path."""
    leaves = {path: np.zeros(shape, np.float64) for path, shape in leaf_shapes(config).items()}
    for place in OWN.tensors.places(config):
        if place.name in tensors:
            array = tensors[place.name].detach().double().numpy()
            place.read(array, place.targets(leaves))
    return leaves


def logits_of(model, tokens=TOKENS, **keys):
    """The logits of these tokens."""
    with torch.no_grad():
        return model(ids(tokens), **keys).logits.numpy()


def written(model, tokens, **keys):
    """The next eight tokens of each row."""
    return model.generate(ids(tokens), do_sample=False, max_new_tokens=8, **keys)[:, tokens.shape[1] :].tolist()


def left_padded(rows, pad=0):
    """(tokens, attention mask) of rows of several lengths."""
    width = max(map(len, rows))
    tokens = np.array([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, ids(mask)
