"""Our PyTorch code is loaded and saved by transformers."""

import json
import re

import jax
import numpy as np
import pytest
from exported_models import SOME, TOKENS, config_of, export, ids, in_torch, logits_of, torch, transformers

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_from_json, mathematics


@pytest.mark.parametrize("name", SOME)
def test_what_transformers_saves_again_is_the_same_model(tmp_path, exported, model_of, name):
    """On both sides: transformers leaves out of config.json what is as it is by default.

    That our Decoder and the PyTorch code compute the same with these parameters is tested in test_exported_logits.py.
    """
    model = model_of(name)
    model.save_pretrained(tmp_path / "again")
    again = in_torch(tmp_path / "again")
    np.testing.assert_array_equal(logits_of(again), logits_of(model))
    config, params = hn.load_huggingface(tmp_path / "again")
    assert mathematics(config) == mathematics(exported(name).config)
    jax.tree.map(np.testing.assert_array_equal, params, exported(name).params)


def test_a_value_that_is_the_default_may_be_left_out(tmp_path):
    """As some versions of transformers leave it out when they save: no default may follow from another value."""
    config = config_of("hybrid_star", num_heads=24, num_kv_heads=12, head_dim=64, d_model=16, num_layers=2)
    config, _, directory = export(tmp_path / "model", config)
    model = in_torch(directory)
    defaults = type(model.config)().to_dict()
    file = directory / "config.json"
    document = json.loads(file.read_text())
    kept = {key: value for key, value in document.items() if key == "model_type" or defaults.get(key) != value}
    assert "num_key_value_heads" not in kept
    assert len(kept) < len(document) / 2
    file.write_text(json.dumps(kept))
    np.testing.assert_array_equal(logits_of(in_torch(directory)), logits_of(model))
    again, _ = hn.load_huggingface(directory)
    assert mathematics(again) == mathematics(config)


@pytest.mark.parametrize("name", ["span", "tied_with_bias", "experts_with_all", "dyt", "derf", "bhyt", "gated"])
def test_loading_leaves_nothing_uninitialized(exported, name):
    """transformers builds the model without memory and then fills what it finds in the file: all must be there."""
    _, _, directory = exported(name)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert {key: list(value) for key, value in found.items() if value} == {}
    # A buffer that no file holds would be whatever was in memory.
    stored = set(model.state_dict())
    assert {buffer for buffer, _ in model.named_buffers()} <= stored
    assert all(torch.isfinite(each).all() for each in model.state_dict().values())


def test_a_tied_head_is_one_tensor_with_the_embedding(exported, model_of):
    assert exported("learned_positions").config.tie_embeddings
    model = model_of("learned_positions")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_model_without_its_head_and_a_device_map(exported):
    pytest.importorskip("accelerate")
    _, _, directory = exported("span")
    body = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, device_map="auto")
    with torch.no_grad():
        hidden = body(ids(TOKENS)).last_hidden_state
        np.testing.assert_allclose(whole.lm_head(hidden).numpy(), logits_of(whole), rtol=0, atol=1e-6)


def test_fresh_weights_are_drawn(exported):
    """From the configuration alone: scales start where the placement says, biases at 0."""
    config = transformers.AutoConfig.from_pretrained(exported("experts_with_all").directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    kernel = model.model.layers[0].mlp.experts.gate_proj
    assert 0.5 * config.initializer_range < float(kernel.std()) < 2 * config.initializer_range
    assert float(model.model.layers[0].attention_post_norm.weight.min()) == 1
    assert float(model.model.layers[0].mlp.experts.down_bias.abs().max()) == 0
    config = transformers.AutoConfig.from_pretrained(exported("hybrid_output_norm").directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.testing.assert_close(model.model.layers[1].attention_branch_norm.weight, torch.full((32,), 8**-0.5))


@pytest.mark.parametrize("name", ["derf", "bhyt", "gated", "dyt"])
def test_what_norms_have_besides_starts_as_here(exported, name):
    """Fresh numbers as NORM_KINDS says, and of matrices of the gate their variance; the scale of the embedding too."""
    config = transformers.AutoConfig.from_pretrained(exported(name).directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    kind = hn.NORM_KINDS[config.norm]
    norms = [module for module in model.modules() if type(module).__name__ == "Norm" and module.kind == kind.name]
    assert len(norms) > 4
    for parameter in kind.parameters:
        fresh = [getattr(norm, parameter.name) for norm in norms]
        if parameter.start is not None:
            assert all(each.tolist() == [parameter.start] for each in fresh)
        else:  # of 512 numbers each the deviation is known to 3 %, and better of all together
            deviations = [float(each.std()) * each.shape[0] ** 0.5 for each in fresh]
            assert abs(np.mean(deviations) - 1) < 0.1
    if config.learned_embedding_scale:
        torch.testing.assert_close(model.model.embedding_scale.weight, torch.full((1,), 32**0.5))


@pytest.mark.parametrize("name", ["dyt", "derf", "bhyt_with_experts", "gated"])
def test_what_norms_have_besides_has_plain_names(exported, name):
    config, _, directory = exported(name)
    names = set(in_torch(directory).state_dict())
    for own in hn.NORM_KINDS[config.norm].parameter_names:
        assert (f"model.norm.{own}" in names) == config.has_final_norm
        assert any(re.fullmatch(rf"model\.layers\.2\..*norm\.{own}", each) for each in names)
    assert ("model.embedding_scale.weight" in names) == config.learned_embedding_scale


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm", "batchnorm", "norm='batchnorm': must be one of rmsnorm"),
        ("placements", [{}], "placements: 1 of them for 4 layers"),
        ("placements", [{"wings": 2}] * 4, r"placements\[0\].wings: not known"),
        ("placements", [{"attention": {"pre": 2}}] * 4, r"placements\[0\].attention.pre=2: must be one of False, True"),
        ("placements", [{"attention": {"tail": 2}}] * 4, r"placements\[0\].attention: its part='tail'"),
        ("placements", [{"attention": {"branch_scale": "x"}}] * 4, "branch_scale='x': must be a number"),
        ("num_key_value_heads", 3, "num_key_value_heads=3: must divide"),
        ("whole_outside", True, "whole_outside=True: needs norm=crmsnorm"),
        ("attn_implementation", "flash_attention_2", "[Ff]lash"),
        ("attn_implementation", "eager", "attn_implementation='eager': this model has sdpa alone"),
    ],
)
def test_nonsense_is_refused_by_name(exported, key, value, message):
    with pytest.raises((ValueError, ImportError), match=message):
        in_torch(exported("span").directory, **{key: value})


def test_the_defaults_of_both_sides_are_the_same():
    from hybridnorm_jax.interop.pytorch.configuration_hybridnorm import HybridNormConfig

    document = HybridNormConfig().to_dict()
    name, stated = config_from_json(json.loads(json.dumps(document)), "all keys")
    assert name == "hybridnorm"
    assert stated == config_from_json({"model_type": "hybridnorm"}, "no keys")[1]
