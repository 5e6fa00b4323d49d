"""Random tiny models of every architecture, and every key of its configuration class changed, against transformers."""

import dataclasses
import json
import zlib

import jax
import numpy as np
import pytest
from drawn_decoders import DRAWS
from transformers_models import EAGER, TOKENS, build, exact_logits_of, in_float64, logits_of, tokens_of

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json, mathematics

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
DECODERS = [name for name, each in ARCHITECTURES.items() if each.config_class is hn.ModelConfig]
# Models of each architecture.
NUMBERS = range(2)
# Of logits in float64, relative to the largest of them. Of 550 models, with range(20) for 26 of the architectures and
# fewer for 8 others, the largest difference was 1.2e-14, and 1.5e-15 of the models that transformers reads from our
# files (2026-11-27, two cores).
EXACT = 1e-12
# Of logits in float32, against those in float64: what some ten roundings leave where nothing makes them grow, and so
# many times the error of transformers, in whose model the same things make them grow. One of the 550 models was above
# it: of OLMo 2, number 19, 8.3e-6 where transformers had 1.3e-6.
ROUNDING, AS_THEIRS = 2e-6, 4


def ours(directory, tokens, dtype):
    """Our logits of a checkpoint, computed in this dtype."""
    with jax.enable_x64(dtype == "float64"):
        config, params = hn.load_huggingface(directory, dtype=dtype)
        model = hn.Decoder(dataclasses.replace(config, dtype=dtype))
        return np.asarray(jax.jit(model.apply)({"params": params}, tokens))


def error(logits, exact):
    """The largest difference, relative to the largest logit or to 1."""
    return float(np.abs(logits - exact).max()) / max(1.0, float(np.abs(exact).max()))


def written(model, directory, **more):
    """The checkpoint as transformers writes it, with further keys in its config.json."""
    model.save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return directory


def how_alibi_is_added(keys):
    """What config.json says of the way in which `build` computes attention."""
    return {"attn_implementation": "eager"} if keys.get("alibi") else {}


def test_every_decoder_is_drawn():
    assert set(DRAWS) == set(DECODERS)


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_random_model_is_read_exactly_and_written_back(tmp_path, name, number):
    """In float64 nothing but the meaning of the file can differ; in float32 both sides are rounded, ours as theirs."""
    seed = zlib.crc32(f"{name} {number}".encode())
    keys = DRAWS[name](np.random.default_rng(seed))
    tokens = tokens_of(keys)
    model = build(name, keys, seed)
    exact = exact_logits_of(model, tokens)
    directory = written(model, tmp_path / "theirs", **how_alibi_is_added(keys))
    assert error(ours(directory, tokens, "float64"), exact) < EXACT, keys
    rounding = ROUNDING + AS_THEIRS * error(logits_of(model, tokens), exact)
    assert error(ours(directory, tokens, "float32"), exact) < rounding, keys
    config, params = hn.load_huggingface(directory)
    hn.save_huggingface(tmp_path / "ours", config, params, architecture=name)
    again, back = hn.load_huggingface(tmp_path / "ours")
    assert mathematics(again) == mathematics(config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **EAGER)
    assert error(exact_logits_of(reread, tokens), exact) < EXACT, keys


# ---- Every key of the configuration class, changed.

# What every class has, and what none of them computes with.
OUTSIDE = {"transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type", "return_dict"}
OUTSIDE |= {"output_hidden_states", "use_cache", "chunk_size_feed_forward", "per_layer_config", "is_encoder_decoder"}
BY_NAME = {
    "hidden_act": ["relu", "gelu_new"],
    "activation_function": ["relu", "silu"],
    "hidden_activation": ["silu", "relu"],
    "activation": ["relu", "silu"],
    "sliding_window": [2, None],
    "window_size": [2],
    "layer_types": [["sliding_attention"], ["full_attention"]],
    "mlp_only_layers": [[0]],
    "no_rope_layers": [[0], [1]],
    "attention_types": [[[["local"], 1]], [[["global"], 1]]],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0},
        {"rope_type": "dynamic", "rope_theta": 77.0, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
    ],
    "attn_config": [{"clip_qkv": 0.3}, {"softmax_scale": 0.3}, {"alibi": False}, {"alibi_bias_max": 4}],
}
# Keys of other architectures, and old names, which a class may read though it does not declare them.
UNDECLARED = [
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "head_dim",
    "n_embed",
    "rope_scaling",
]
UNDECLARED += ["sliding_window_pattern", "rope_local_base_freq", "original_max_position_embeddings", "layer_norm_eps"]
UNDECLARED += [
    "num_experts",
    "num_local_experts",
    "logit_scale",
    "scale_embedding",
    "qk_layernorm",
    "use_bias",
    "alibi",
]
UNDECLARED_VALUES = {
    "rope_scaling": [{"rope_type": "linear", "factor": 3.0}],
    "partial_rotary_factor": [0.5],
    "rotary_pct": [0.5],
}


def other_values(key, value):
    """Values of a key that differ from this one, of its type."""
    if key in BY_NAME:
        return BY_NAME[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    if isinstance(value, float):
        return [1.7 * value + 0.1]
    return [True, 3, 0.7] if value is None else []


def edits(name, base):
    """(key, value): every key of the class and of its aliases, each with other values."""
    config = transformers.AutoConfig.for_model(name, **(TOKENS | base))
    declared = {field.name for field in dataclasses.fields(config)} - OUTSIDE
    for key in sorted(declared):
        for value in other_values(key, getattr(config, key)):
            yield key, value
    for key, target in config.attribute_map.items():
        for value in other_values(target, getattr(config, target)):
            yield key, value
    for key in UNDECLARED:
        if key not in declared:
            for value in UNDECLARED_VALUES.get(key, [3, 0.7, True]):
                yield key, value


def one_layer(name):
    """The keys of a model of one layer, so that lists of layers have one entry."""
    for seed in range(1000):
        keys = DRAWS[name](np.random.default_rng(seed))
        counts = [keys[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in keys]
        if counts == [1] and not keys.get("alibi"):
            return keys
    raise AssertionError(name)


ROPE_KEYS = {
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_local_base_freq",
}


def edited(document, key, value):
    """The document with this value, and the same without it.

    rope_parameters states what older keys state, which could only contradict it.
    """
    kept = {each: stated for each, stated in document.items() if each != "rope_parameters" or key not in ROPE_KEYS}
    return kept | {key: value}, kept


def their_logits(name, document, tokens):
    """Those of a model with the keys of this config.json, in float64, and the model."""
    keys = {each: stated for each, stated in document.items() if each not in ("model_type", "architectures")}
    with in_float64():
        model = build(name, keys)
        return logits_of(model, tokens), model


@pytest.mark.long
@pytest.mark.parametrize("name", DECODERS)
def test_a_changed_key_is_exact_or_refused(tmp_path, name):
    """Wherever a key changes what transformers computes, it changes our model to the same, or is refused."""
    base = one_layer(name)
    tokens = tokens_of(base)
    document = json.loads((written(their_logits(name, base, tokens)[1], tmp_path / "base") / "config.json").read_text())
    refused, ignored, exact = {}, [], []
    for number, (key, value) in enumerate(edits(name, base)):
        changed, usual = edited(document, key, value)
        try:
            found = mathematics(config_from_json(changed, "config.json")[1])
        except hn.UserError as refusal:
            refused[key] = str(refusal)
            continue
        try:
            theirs, model = their_logits(name, changed, tokens)
        except Exception:  # their class refuses what ours takes, such as a vocabulary without the file's tokens
            continue
        if found == mathematics(config_from_json(usual, "config.json")[1]):
            before, _ = their_logits(name, usual, tokens)
            assert error(before, theirs) < EXACT, f"{key}={value} of {usual}"
            ignored.append(key)
            continue
        directory = written(model, tmp_path / str(number))
        (directory / "config.json").write_text(json.dumps(changed))
        assert error(ours(directory, tokens, "float64"), theirs) < EXACT, f"{key}={value} of {usual}"
        exact.append(key)
    print(f"{name}: exact {sorted(set(exact))}, without effect {sorted(set(ignored))}, refused {sorted(refused)}")
    assert len(set(exact)) >= 6
    assert refused
    assert not any("\n" in line for line in refused.values())
