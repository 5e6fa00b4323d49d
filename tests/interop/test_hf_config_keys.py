"""Each architecture's config.json means what transformers' class makes of it, or is refused in one line.

The tables were made with transformers 5.24.0, whose classes a test asks again where the package is installed.
"""

import dataclasses
import math

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json
from hybridnorm_jax.interop.hf_rope_keys import written_fraction

SMALL = {
    "gpt2": {"n_embd": 80, "n_head": 4},
    "gpt_neox": {"hidden_size": 80, "num_attention_heads": 4},
    "opt": {"hidden_size": 80, "num_attention_heads": 4},
    "llama": {"hidden_size": 80, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 20},
    "olmo2": {"hidden_size": 80, "num_attention_heads": 4},
    "olmoe": {"hidden_size": 80, "num_attention_heads": 4},
}
WHOLE_HEADS = ["llama", "qwen3", "olmo2", "olmoe"]


def read(name, keys):
    return config_from_json({"model_type": name} | SMALL.get(name, {}) | keys, "config.json")[1]


def refused(name, keys):
    """The message of the refusal, which names a key of these."""
    with pytest.raises(hn.UserError) as raised:
        read(name, keys)
    message = str(raised.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


# ---- The rotation: architecture -> (keys of config.json, rope_theta, how many channels of a head rotate).

ROTATIONS = {
    "gpt_neox": [
        ({"hidden_size": 64}, 1e4, 4),
        ({"rotary_emb_base": 5e3, "rotary_pct": 0.5}, 5e3, 10),
        ({"rotary_pct": 1}, 1e4, 20),
        ({"rotary_pct": 0.72}, 1e4, 14),  # 14.4
        ({"rotary_pct": 0.749}, 1e4, 14),  # 14.98, which transformers cuts
        ({"rope_parameters": {"rope_theta": 3, "partial_rotary_factor": 0.5, "rope_type": "default"}}, 3, 10),
        ({"rope_parameters": {"rope_theta": 3}, "rotary_pct": 0.5}, 3, 10),
        ({"rope_scaling": {"partial_rotary_factor": 0.4}, "rotary_emb_base": 7}, 7, 8),
        # As transformers 4.43 to 4.57 wrote it.
        ({"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 9, "rope_theta": 9}, 9, 10),
    ],
    **{
        name: [
            ({}, 1e4, 20),
            ({"rope_theta": 5e5}, 5e5, 20),
            ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}, 5e5, 20),
            ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, 20),
            ({"rope_scaling": {"type": "default"}, "rope_theta": 7}, 7, 20),
            ({"rope_scaling": {"rope_theta": 7}, "rope_parameters": {"rope_theta": 7, "rope_type": "default"}}, 7, 20),
            ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 7}}, 7, 20),
            ({"partial_rotary_factor": 1.0}, 1e4, 20),
            ({"partial_rotary_factor": None}, 1e4, 20),
        ]
        for name in WHOLE_HEADS
    },
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_rotation_is_that_of_transformers(name):
    for keys, theta, rotary_dim in ROTATIONS[name]:
        config = read(name, keys)
        assert (config.rope_theta, config.rotary_width) == (theta, rotary_dim), keys
        # What we write is that integer, rounded to the nearest one or cut.
        product = config.head_dim * written_fraction(config.rotary_width, config.head_dim)
        assert int(product) == round(product) == rotary_dim


def test_a_mapping_without_keys_is_not_the_default_of_an_absent_one():
    """gpt-oss without rope_parameters has YaRN, and with empty ones a plain rotation; both once were YaRN."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for keys, scaling in (({}, "yarn"), ({"rope_parameters": None}, "yarn"), ({"rope_parameters": {}}, "none")):
        config = read("gpt_oss", {**sizes, "num_hidden_layers": 2, **keys})
        assert (config.rope_scaling, config.rope_theta) == (scaling, 150000.0)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoConfig.for_model("gpt_oss", **keys).rope_parameters
        assert (theirs["rope_type"] == "yarn") == (scaling == "yarn")
        assert theirs["rope_theta"] == 150000.0


FOREIGN = {
    "gpt_neox": [
        ({"rope_theta": 5e5}, "rope_theta=500000.0: this architecture reads rotary_emb_base instead"),
        ({"rope_theta": 5e5, "rotary_emb_base": 1e4}, "rope_theta=500000.0: this architecture reads rotary_emb_base"),
        ({"rope_theta": 1e4}, "rope_theta=10000.0: this architecture reads rotary_emb_base"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture reads rotary_pct instead"),
        ({"rope_parameters": {"rotary_pct": 0.5}}, "rope_parameters.rotary_pct=0.5"),
        ({"rope_parameters": {"rotary_emb_base": 5.0}}, "rope_parameters.rotary_emb_base=5.0"),
        ({"rope_scaling": {"rotary_emb_base": 5.0}}, "rope_scaling.rotary_emb_base=5.0"),
        ({"rotary_pct": 0.25}, "partial_rotary_factor=0.25: 5 of 20 channels would rotate"),
        ({"rotary_pct": 0.04}, "partial_rotary_factor=0.04: 0 of 20 channels would rotate"),
        ({"rotary_pct": 1.5}, "rotary_pct=1.5 is out of range"),
        ({"rotary_pct": None}, "rotary_pct=None must be a number"),
        ({"rotary_emb_base": math.inf}, "rotary_emb_base=inf is out of range"),
        ({"head_dim": 40}, "head_dim=40 is not known for gpt_neox"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not known for gpt_neox"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001 is not known for gpt_neox"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps=0.001 is not known for gpt_neox"),
        ({"parallel_residual": False}, "parallel_residual=False is not known for gpt_neox"),
    ],
    "gpt2": [
        ({"rope_theta": 5e5}, "rope_theta=500000.0 is not known for gpt2"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters={'rope_theta': 500000.0} is not known for gpt2"),
        ({"hidden_size": 96}, "n_embd=80, but hidden_size, another name of it, is 96"),
        ({"max_position_embeddings": 64, "n_positions": 32}, "n_positions=32, but max_position_embeddings"),
        ({"intermediate_size": 96}, "intermediate_size=96 is not known for gpt2"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known for gpt2"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001 is not known for gpt2"),
        ({"head_dim": 40}, "head_dim=40 is not known for gpt2"),
        ({"activation_function": "gelu_10"}, "activation_function='gelu_10' is not implemented"),
    ],
    "opt": [
        ({"rope_theta": 5e5}, "rope_theta=500000.0 is not known for opt"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not known for opt"),
        ({"intermediate_size": 96}, "intermediate_size=96 is not known for opt"),
        ({"n_positions": 96}, "n_positions=96 is not known for opt"),
        ({"attention_bias": False}, "attention_bias=False is not known for opt"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001 is not known for opt"),
        ({"activation_function": "mish"}, "activation_function='mish' is not implemented"),
    ],
    **{
        name: [
            ({"rotary_emb_base": 5e5}, f"rotary_emb_base=500000.0 is not known for {name}"),
            ({"rotary_pct": 0.5}, f"rotary_pct=0.5 is not known for {name}"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture rotates whole heads"),
            ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5: this architecture"),
            (
                {"rope_parameters": {"rotary_emb_base": 5.0}},
                "rope_parameters.rotary_emb_base=5.0: rope_type=default has no",
            ),
            ({"rope_parameters": {"rotary_pct": 1.0}}, "rope_parameters.rotary_pct=1.0: rope_type=default has no"),
            ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "rope_parameters.full_attention="),
            ({"rope_parameters": {"rope_type": None}}, "rope_parameters.rope_type=None is not implemented"),
            ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 7.0}}, "rope_scaling is read in"),
            ({"rope_theta": None}, "rope_theta=None must be a number"),
            ({"rope_parameters": []}, "rope_parameters=[] must be a mapping"),
            ({"rope_scaling": False}, "rope_scaling=False must be a mapping"),
            ({"layer_norm_eps": 1e-3}, f"layer_norm_eps=0.001 is not known for {name}"),
            ({"n_positions": 64}, f"n_positions=64 is not known for {name}"),
            ({"use_parallel_residual": True}, f"use_parallel_residual=True is not known for {name}"),
            ({"hidden_act": "gelu_10"}, "hidden_act='gelu_10' is not implemented"),
            ({"activation_function": "silu"}, f"activation_function='silu' is not known for {name}"),
        ]
        for name in WHOLE_HEADS
    },
}
# Read by other architectures alone, or by none.
ELSEWHERE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
    "logit_scale": 2.0,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attn_temperature_tuning": True,
    "attention_sink": True,
    "alibi": True,
    "position_embedding_type": "relative_key",
    "parallel_attn": True,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "norm_type": "rms",
    "n_shared_experts": 1,
    "moe_intermediate_size": 96,
    "decoder_sparse_step": 2,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "mlp_only_layers": [0],
    "text_config": {"hidden_size": 96},
    "quantization_config": {"bits": 4},
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "dtype": "float8_e4m3fn",
    "torch_dtype": 16,
    "layer_types": ["sliding_attention"],
    "attention_chunk_size": 512,
    "no_rope_layers": [1],
    "per_layer_config": [{"hidden_size": 96}],
    "is_causal": False,
    "a\nb": 1,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_key_of_another_architecture_or_place_is_refused_by_name(name):
    for keys, message in FOREIGN[name]:
        assert message in refused(name, keys), keys


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_key_that_no_such_model_has_is_refused_by_name(name):
    architecture = ARCHITECTURES[name]
    for key, value in ELSEWHERE.items():
        is_right = architecture.fixed.get(key) == value  # an encoder is not causal
        if key not in architecture._own_names and not is_right:
            assert repr(key).strip("'") in refused(name, {key: value})


# Sizes and the rest: architecture -> (keys, the fields they decide).
OTHER_KEYS = {
    "gpt2": [
        # Other names that the class reads.
        ({"max_position_embeddings": 64}, {"max_positions": 64}),
        ({"num_hidden_layers": 2}, {"num_layers": 2}),
        ({"num_hidden_layers": 2, "n_layer": 2}, {"num_layers": 2}),
        ({"n_inner": None}, {"mlp_dim": 320}),
        ({"n_inner": 96}, {"mlp_dim": 96}),
        (
            {"activation_function": "gelu_fast", "layer_norm_epsilon": 1e-3},
            {"activation": "gelu_tanh", "norm_eps": 1e-3},
        ),
        ({}, {"tie_embeddings": True, "attention_bias": True, "mlp_bias": True, "activation": "gelu_tanh"}),
    ],
    "gpt_neox": [
        ({"rotary_pct": 0.5}, {"attention_bias": True, "mlp_bias": True, "tie_embeddings": False, "norm_eps": 1e-5}),
        ({"rotary_pct": 0.5, "attention_bias": False}, {"attention_bias": False, "mlp_bias": True}),
        ({"rotary_pct": 0.5, "use_parallel_residual": False, "hidden_act": "relu"}, {"scheme": "pre"}),
    ],
    "opt": [
        ({}, {"tie_embeddings": True, "activation": "relu", "position_offset": 2, "norm_eps": 1e-5, "mlp_dim": 3072}),
        ({"enable_bias": False, "ffn_dim": 96}, {"attention_bias": False, "mlp_bias": False, "mlp_dim": 96}),
        ({"max_position_embeddings": 64}, {"max_positions": 64}),
    ],
    "llama": [
        ({}, {"num_kv_heads": 4, "head_dim": 20, "norm_eps": 1e-6, "tie_embeddings": False, "mlp_bias": False}),
        ({"head_dim": None, "num_key_value_heads": None}, {"num_kv_heads": 4, "head_dim": 20}),
        ({"head_dim": 32, "num_key_value_heads": 2}, {"num_kv_heads": 2, "head_dim": 32}),
    ],
    "qwen3": [
        ({"num_key_value_heads": None}, {"num_kv_heads": 4, "norm_eps": 1e-6}),
        ({"sliding_window": 4, "use_sliding_window": False, "head_dim": 32}, {"head_dim": 32}),
    ],
    "olmo2": [({}, {"num_kv_heads": 4, "head_dim": 20, "norm_eps": 1e-5, "attention_bias": False})],
    "olmoe": [
        ({}, {"num_experts": 64, "experts_per_token": 8, "normalize_expert_weights": False, "norm_eps": 1e-5}),
        ({"num_local_experts": 9, "norm_topk_prob": True}, {"num_experts": 9, "normalize_expert_weights": True}),
    ],
}


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_other_keys_mean_what_they_mean_to_transformers(name):
    for keys, fields in OTHER_KEYS[name]:
        config = dataclasses.asdict(read(name, keys))
        assert {field: config[field] for field in fields} == fields, keys


def test_gpt2_by_its_other_names_alone():
    keys = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2, "max_position_embeddings": 8}
    _, config = config_from_json({"model_type": "gpt2"} | keys, "config.json")
    assert (config.d_model, config.num_heads, config.num_layers, config.max_positions) == (96, 6, 2, 8)
    assert config.mlp_dim == 4 * 96


# ---- Where transformers is installed: every key alone, and what its class makes of it.

_VALUES = [0.5, 2.0, 3, 64, True, False, None, "relu", "gelu", {"rope_theta": 3.0}, {"partial_rotary_factor": 0.5}]


def _theirs(transformers, name, document):
    """The numbers by which transformers' model of this document computes."""
    config = transformers.AutoConfig.for_model(**document)
    common = {
        "d_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "tie_embeddings": bool(config.tie_word_embeddings),
    }
    if name in ("gpt2", "opt"):
        return common | {"max_positions": config.max_position_embeddings}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fraction = config.rope_parameters.get("partial_rotary_factor", 1.0) if name == "gpt_neox" else 1.0
    eps = config.layer_norm_eps if name == "gpt_neox" else config.rms_norm_eps
    rotation = {"rope_theta": config.rope_parameters["rope_theta"], "rotary_width": int(head_dim * fraction)}
    return common | rotation | {"head_dim": head_dim, "norm_eps": eps, "attention_bias": config.attention_bias}


@pytest.mark.parametrize("name", SMALL)
def test_no_key_is_taken_that_transformers_passes_over_nor_passed_over_that_it_takes(name):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    base = {"model_type": name} | SMALL[name] | ({"rotary_pct": 0.5} if name == "gpt_neox" else {})
    known = {key for architecture in ARCHITECTURES.values() for key in architecture._known}
    compared = 0
    for key in sorted(known - {"model_type", "architectures"}):
        for value in _VALUES:
            try:
                _, config = config_from_json(base | {key: value}, "config.json")
            except hn.UserError:
                continue
            try:
                theirs = _theirs(transformers, name, base | {key: value})
            except Exception:  # they refuse what we take: an odd type of a key that changes no number
                continue
            assert {field: getattr(config, field) for field in theirs} == theirs, (key, value)
            compared += 1
    assert compared > 400


# ---- The integer that rotates, as a fraction.


def test_a_fraction_stands_for_its_integer_cut_or_rounded():
    for head_dim in range(2, 300):
        for rotary_dim in range(2, head_dim + 1, 2):
            fraction = written_fraction(rotary_dim, head_dim)
            assert int(head_dim * fraction) == round(head_dim * fraction) == rotary_dim
            assert 0 < fraction <= 1
    assert written_fraction(16, 64) == 0.25
