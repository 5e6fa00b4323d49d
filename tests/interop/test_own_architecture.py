"""config.json of our own PyTorch code: every field of a model is in it, and what it says is read as data alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop import own_architecture
from hybridnorm_jax.interop.architectures import config_from_json, config_to_json, mathematics
from hybridnorm_jax.interop.huggingface import CODE, load_huggingface, save_huggingface
from tests.schemes import keys_of

FIELDS = [field.name for field in dataclasses.fields(hn.ModelConfig)]
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
GATED_SHARED = {"shared_experts": 1, "shared_expert_gate": True}
_STRETCHED = {"rope_factor": 4.0, "rope_original_length": 64}
LLAMA3 = _STRETCHED | {"rope_scaling": "llama3", "rope_bounds": (1.0, 4.0)}
YARN = _STRETCHED | {"rope_scaling": "yarn", "rope_bounds": (1.0, 32.0)}
LONGROPE = _STRETCHED | {
    "rope_scaling": "longrope",
    "rope_short_factors": (1.0, 1.25, 1.5, 2.0),
    "rope_long_factors": (1.0, 2.5, 3.5, 4.0),
}
# Another value of each field that config.json holds, and what else a model with it needs.
OTHER_VALUES = {
    "scheme": {"scheme": "span"},
    "d_model": {"d_model": 64},
    "num_layers": {"num_layers": 5},
    "num_heads": {"num_heads": 2, "head_dim": 8},
    "num_kv_heads": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 16},
    "mlp_dim": {"mlp_dim": 32},
    "vocab_size": {"vocab_size": 62},
    "activation": {"activation": "gelu"},
    "num_experts": {"num_experts": 4, "experts_per_token": 2},
    "experts_per_token": {"num_experts": 4, "experts_per_token": 3},
    "normalize_expert_weights": {"num_experts": 4, "experts_per_token": 2, "normalize_expert_weights": True},
    "shared_experts": {"num_experts": 4, "experts_per_token": 2, "shared_experts": 2},
    "balance_bias": {"num_experts": 4, "experts_per_token": 2, "balance_bias": True},
    "norm": {"norm": "layernorm"},
    "attention_norm": {"attention_norm": "layernorm"},
    "norm_eps": {"norm_eps": 1e-3},
    "norm_scale": {"norm_scale": False},
    "norm_bias": {"norm_bias": True},
    "norm_width": {"norm": "crmsnorm", "norm_width": 30},
    "attention_norm_scale": {"attention_norm_scale": False},
    "attention_norm_bias": {"attention_norm_bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_bias": {"head_bias": True},
    "tie_embeddings": {"tie_embeddings": True},
    "embedding_norm": {"embedding_norm": "true"},
    "outer_norm_scale": {"outer_norm_scale": False},
    "outer_norm_bias": {"outer_norm_bias": True},
    "whole_outside": {"norm": "crmsnorm", "whole_outside": True},
    "embedding_centring": {"embedding_centring": True},
    "positions": {"positions": "learned", "max_positions": 16},
    "rope_theta": {"rope_theta": 500.0},
    "rotary_dim": {"rotary_dim": 4},
    "max_positions": {"positions": "learned", "max_positions": 17},
    "position_offset": {"positions": "learned", "max_positions": 16, "position_offset": 2},
    "dropout": {"dropout": 0.25},
    "init_std": {"init_std": 0.5},
    "norm_scale_plus_one": {"norm_scale_plus_one": True},
    "attention_norm_per_head": {"scheme": "pre_qk_pre", "attention_norm_per_head": True},
    "layer_scale": {"layer_scale": True},
    "rope_layers": {"rope_layers": (1, 0)},
    "second_rope_theta": {"rope_layers": (1, 1, 2), "second_rope_theta": 500.0},
    "rope_scaling": {"rope_scaling": "linear", "rope_factor": 2.0},
    "rope_factor": {"rope_scaling": "linear", "rope_factor": 2.5},
    "rope_original_length": LLAMA3,
    "rope_bounds": LLAMA3,
    "rope_attention_factor": YARN | {"rope_attention_factor": 1.25},
    "rope_truncate": YARN | {"rope_truncate": False},
    "rope_short_factors": LONGROPE,
    "rope_long_factors": LONGROPE,
    "alibi_max": {"positions": "alibi", "alibi_max": 4.0},
    "alibi_scale": {"positions": "alibi", "alibi_scale": 0.5},
    "alibi_bfloat16": {"positions": "alibi", "alibi_bfloat16": True},
    "windows": {"windows": (4, 0)},
    "attention_scale": {"attention_scale": 0.75},
    "score_cap": {"score_cap": 20.5},
    "qkv_clip": {"qkv_clip": 1.5},
    "attention_sinks": {"attention_sinks": True},
    "shared_mlp_dim": EXPERTS | {"shared_experts": 1, "shared_mlp_dim": 24},
    "shared_expert_gate": EXPERTS | GATED_SHARED,
    "shared_expert_gate_bias": EXPERTS | GATED_SHARED | {"shared_expert_gate_bias": True},
    "dense_layers": EXPERTS | {"dense_layers": (1,)},
    "dense_mlp_dim": EXPERTS | {"dense_layers": (0,), "dense_mlp_dim": 24},
    "clamp_limit": {"activation": "swiglu_clamped", "clamp_limit": 1.5},
    "clamp_alpha": {"activation": "swiglu_clamped", "clamp_alpha": 1.5},
    "attention_output_bias": {"attention_output_bias": True},
    "mlp_output_bias": {"mlp_output_bias": True},
    "router_bias": EXPERTS | {"router_bias": True},
    "embedding_scale": {"embedding_scale": 5.5},
    "learned_embedding_scale": {"learned_embedding_scale": True},
    "branch_multiplier": {"branch_multiplier": 0.25},
    "ramp_steps": {"scheme": "prores_post", "ramp_steps": 50, "ramp_at": 20},
    "ramp_at": {"scheme": "prores_pre", "ramp_at": 20},
    "logit_scale": {"logit_scale": 0.125},
    "logit_cap": {"logit_cap": 30.5},
}
# Of models alone that training may not change: nothing else depends on them.
WITHOUT_MATHEMATICS = ("dropout", "init_std")


def test_every_field_of_a_model_is_accounted_for():
    """A new field is written to config.json, or it is said why it need not be."""
    written = {field for key in own_architecture.OWN.keys for field in key.fields} | set(own_architecture.READ_APART)
    assert written | set(own_architecture.NOT_WRITTEN) == set(FIELDS)
    assert not written & set(own_architecture.NOT_WRITTEN)
    assert set(OTHER_VALUES) == written


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_every_field_that_is_written_comes_back(small_config, field):
    config, other = small_config(), small_config(**OTHER_VALUES[field])
    assert getattr(config, field) != getattr(other, field)
    _, document = config_to_json(other, "hybridnorm")
    document = json.loads(json.dumps(document))
    name, back = config_from_json(document, "config.json")
    assert name == "hybridnorm"
    assert getattr(back, field) == getattr(other, field)
    assert mathematics(back) == mathematics(other)
    if field not in WITHOUT_MATHEMATICS:  # otherwise an architecture that lacks it would be taken for this model's
        assert mathematics(other) != mathematics(config)


@pytest.mark.parametrize("scheme", hn.SCHEMES)
def test_placements_come_back_as_they_were(small_config, scheme):
    config = small_config(**keys_of(scheme), num_layers=8)
    document = json.loads(json.dumps(config_to_json(config, "hybridnorm")[1]))
    placements = [own_architecture.placement_from_json(each, "placements") for each in document["placements"]]
    assert tuple(placements) == config.placements
    assert config_from_json(document, "config.json")[1].scheme == scheme


@pytest.mark.parametrize("keys", [{}, OTHER_VALUES["balance_bias"] | {"mlp_bias": True}, {"param_dtype": "bfloat16"}])
@pytest.mark.parametrize("limit", [30_000, 5_000_000_000])
def test_parameters_come_back_bit_for_bit(tmp_path, small_config, random_params, keys, limit):
    config = small_config(**keys)
    params = random_params(config)
    save_huggingface(tmp_path / "out", config, jax.tree.map(jax.numpy.asarray, params), max_shard_bytes=limit)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (limit == 30_000)
    back, read = load_huggingface(tmp_path / "out")
    assert mathematics(back) == mathematics(config)
    assert back.param_dtype == config.param_dtype
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(read), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == other.dtype
        assert leaf.tobytes() == np.asarray(other).tobytes(), path


def test_another_dtype_is_written_as_it_is_asked_for(tmp_path, small_config, random_params):
    config = small_config()
    params = random_params(config)
    save_huggingface(tmp_path / "half", config, params, dtype="bfloat16")
    back, read = load_huggingface(tmp_path / "half")
    assert back.param_dtype == "bfloat16"
    for leaf, other in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, other.astype(jax.numpy.bfloat16))
    params["final_norm"]["scale"] = np.where(np.arange(config.d_model) == 0, np.float32(1e30), 1)
    with pytest.raises(hn.UserError, match="final_norm/scale: holds NaN or Inf, written as float16"):
        save_huggingface(tmp_path / "out", config, params, dtype="float16")
    with pytest.raises(hn.UserError, match="dtype=int8"):
        save_huggingface(tmp_path / "out", config, params, dtype="int8")


def test_a_scheme_of_a_users_own_file_is_written_and_read(tmp_path, small_config, random_params):
    """The PyTorch code needs no table. To go on here the plugin must be there: a run needs the name of a scheme."""

    @hn.scheme("alternating", initializer="megatron")
    def alternating(layer, num_layers):
        half = hn.SublayerPlacement(pre=True, branch_scale=0.5) if layer % 2 else hn.SublayerPlacement(post=True)
        return hn.BlockPlacement(half, half)

    config = small_config(scheme="alternating")
    save_huggingface(tmp_path / "out", config, random_params(config))
    assert load_huggingface(tmp_path / "out")[0].scheme == "alternating"
    del hn.SCHEMES["alternating"]
    with pytest.raises(hn.UserError, match=r"scheme='alternating': no scheme here has its placements; import the plug"):
        load_huggingface(tmp_path / "out")


def test_a_renamed_scheme_is_found_by_its_placements(small_config):
    document = config_to_json(small_config(scheme="span"), "hybridnorm")[1] | {"scheme": "somebody's name of it"}
    assert config_from_json(document, "config.json")[1].scheme == "span"


def test_code_in_the_directory_is_not_executed(tmp_path, small_config, random_params):
    config = small_config()
    save_huggingface(tmp_path / "out", config, random_params(config))
    for file in own_architecture.CODE_FILES:
        assert (tmp_path / "out" / file).read_bytes() == (CODE / file).read_bytes()
        (tmp_path / "out" / file).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit\n")
    load_huggingface(tmp_path / "out")
    assert not (tmp_path / "executed").exists()


PLACEMENT = {"attention": {"pre": True}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"placements": "pre"}, "placements: must be a list"),
        ({"placements": [PLACEMENT]}, "placements: 1 of them, but num_hidden_layers=3"),
        ({"placements": [7, PLACEMENT, PLACEMENT]}, r"placements\[0\]=7: must be a mapping"),
        ({"placements": [{"wings": 1}] * 3}, r"placements\[0\].wings: not known; known: attention"),
        ({"placements": [{"attention": {"wings": 1}}] * 3}, r"placements\[0\].attention.wings: not known; known: pre"),
        ({"placements": [{"attention": {"pre": "yes"}}] * 3}, r"placements\[0\]: pre='yes' must be one of False, True"),
        ({"placements": [{"attention": {"pre": []}}] * 3}, r"placements\[0\]: pre=\[\] must be one of"),
        ({"placements": [{"attention": {"branch_scale": 1e99}}] * 3}, r"placements\[0\]: branch_scale=1e\+99 must be"),
        ({"placements": [{"q_norm": "everywhere"}] * 3}, r"placements\[0\]: q_norm='everywhere' must be one of"),
        ({"placements": [PLACEMENT] * 3}, "placements and final_norm are not those of scheme=hybrid_star, nor of any"),
        ({"final_norm": False}, "placements and final_norm are not those of scheme=hybrid_star"),
        ({"final_norm": None}, "final_norm=null, but a value is needed"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers=10001 is out of range"),
        ({"hidden_size": "wide"}, "hidden_size='wide' must be of type int"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is not implemented"),
        ({"rotary_dim": 0}, "rotary_dim=0: must be at least 2"),
        (
            {"rotary_dim": 10},
            "rotary_dim=10: rope rotates pairs, so it must be an even number, at most model.head_dim=8",
        ),
        ({"rotary_dim": 3}, "rotary_dim=3: rope rotates pairs"),
        ({"positions": "learned"}, "max_positions"),
        ({"num_experts": 3}, "experts_per_token"),
        ({"wings": 2}, "wings=2 is not known for hybridnorm"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"vocab_size": 60}, "config.json asks for"),
    ],
)
def test_nonsense_is_refused_in_one_line(tmp_path, small_config, random_params, keys, message):
    config = small_config(scheme="hybrid_star")
    save_huggingface(tmp_path / "out", config, random_params(config))
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(hn.UserError, match=message) as raised:
        load_huggingface(tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert "config.json" in str(raised.value)
