"""OLMoE checkpoints: one tensor per expert there, one leaf for all of them here, and the same logits."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json, config_to_json, mathematics
from hybridnorm_jax.interop.huggingface import load_huggingface, save_huggingface
from hybridnorm_jax.interop.safetensors_files import StoredTensors

OLMOE = Path(__file__).parents[1] / "goldens" / "hf_olmoe"
LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def golden():
    with np.load(OLMOE / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def copy(tmp_path):
    """Copies the golden to tmp_path/olmoe; keys of config.json given as arguments are set, those of None removed."""

    def make(change=None, **config):
        directory = tmp_path / "olmoe"
        shutil.copytree(OLMOE, directory)
        document = json.loads((OLMOE / "config.json").read_text()) | config
        kept = {key: value for key, value in document.items() if config.get(key, value) is not None}
        (directory / "config.json").write_text(json.dumps(kept))
        if change is not None:
            arrays = load_file(directory / "model.safetensors")
            change(arrays)
            save_file(arrays, directory / "model.safetensors")
        return directory

    return make


def logits_of(config, params, tokens):
    return np.asarray(jax.jit(hn.Decoder(config).apply)({"params": params}, tokens))


# ---- In


@pytest.mark.parametrize("dispatch", ["auto", "dense", "blocked", "ragged"])
def test_every_dispatch_has_the_logits_of_transformers(golden, dispatch):
    config, params = load_huggingface(OLMOE)
    config = dataclasses.replace(config, expert_dispatch=dispatch)
    np.testing.assert_allclose(logits_of(config, params, golden["tokens"]), golden["logits"], rtol=0, atol=1e-5)


def test_an_expert_of_theirs_is_the_slice_of_its_layer_and_number():
    _, params = load_huggingface(OLMOE)
    stored = load_file(OLMOE / "model.safetensors")
    ours = params["run_0"]["feed_forward"]
    assert list(params) == ["final_norm", "head", "run_0", "token_embedding"]
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        np.testing.assert_array_equal(ours["router"]["kernel"][layer], stored[f"{mlp}.gate.weight"].T)
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                theirs = stored[f"{mlp}.experts.{expert}.{name}_proj.weight"]
                np.testing.assert_array_equal(ours[f"expert_{name}"]["kernel"][layer, expert], theirs.T)


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def rotated(x, theta):
    """RoPE on (batch, heads, seq, head_dim): channel i turns with channel i + head_dim / 2."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def experts_in_numpy(x, weights, prefix, k, normalize):
    """The experts of a layer on one token, one after the other."""
    p = softmax(weights[f"{prefix}gate.weight"] @ x)
    chosen = np.argsort(-p)[:k]
    total = p[chosen].sum() if normalize else 1.0
    y = np.zeros_like(x)
    for expert in chosen:
        gate, up, down = (weights[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        hidden = gate @ x
        y += p[expert] / total * (down @ (hidden / (1 + np.exp(-hidden)) * (up @ x)))
    return y


def olmoe_in_numpy(directory, tokens):
    """The logits of a directory in float64, from the paper's equations (2409.02060) and the tensors' names."""
    weights = {name: array.astype(np.float64) for name, array in load_file(directory / "model.safetensors").items()}
    keys = json.loads((directory / "config.json").read_text())
    heads, eps, theta = keys["num_attention_heads"], keys["rms_norm_eps"], keys["rope_parameters"]["rope_theta"]
    x = weights["model.embed_tokens.weight"][tokens]
    batch, seq, width = x.shape
    for layer in range(keys["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        attention = f"{block}self_attn."
        read = rms_norm(x, weights[f"{block}input_layernorm.weight"], eps)
        q, k, v = (read @ weights[f"{attention}{name}_proj.weight"].T for name in "qkv")
        q, k = (rms_norm(y, weights[f"{attention}{name}_norm.weight"], eps) for name, y in (("q", q), ("k", k)))
        q, k, v = (y.reshape(batch, seq, heads, -1).swapaxes(1, 2) for y in (q, k, v))
        scores = rotated(q, theta) @ rotated(k, theta).swapaxes(-1, -2) / np.sqrt(width // heads)
        scores = np.where(np.tri(seq, dtype=bool), scores, -np.inf)
        context = (softmax(scores) @ v).swapaxes(1, 2).reshape(batch, seq, width)
        x = x + context @ weights[f"{attention}o_proj.weight"].T
        read = rms_norm(x, weights[f"{block}post_attention_layernorm.weight"], eps)
        options = f"{block}mlp.", keys["num_experts_per_tok"], keys["norm_topk_prob"]
        x = x + np.apply_along_axis(experts_in_numpy, -1, read, weights, *options)
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def test_the_equations_in_numpy_are_those_of_transformers(golden):
    np.testing.assert_allclose(olmoe_in_numpy(OLMOE, golden["tokens"]), golden["logits"], rtol=0, atol=1e-5)


def test_norm_topk_prob_divides_the_weights_by_their_sum(copy, golden):
    source = copy(norm_topk_prob=True)
    config, params = load_huggingface(source)
    assert config.normalize_expert_weights
    logits = logits_of(config, params, golden["tokens"])
    np.testing.assert_allclose(logits, olmoe_in_numpy(source, golden["tokens"]), rtol=0, atol=1e-5)
    assert np.abs(logits - golden["logits"]).max() > 0.01


def test_norm_topk_prob_means_the_same_to_transformers(copy, golden):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = copy(norm_topk_prob=True)
    model = transformers.OlmoeForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.asarray(golden["tokens"], np.int64))).logits.numpy()
    logits = logits_of(*load_huggingface(source), golden["tokens"])
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5)


def test_every_tensor_is_read_once(monkeypatch):
    read = []
    tensor = StoredTensors.read
    monkeypatch.setattr(StoredTensors, "read", lambda self, name: read.append(name) or tensor(self, name))
    load_huggingface(OLMOE)
    assert sorted(read) == sorted(load_file(OLMOE / "model.safetensors"))


@pytest.mark.parametrize(
    ("keys", "experts"), [({"num_local_experts": 4}, 4), ({"num_local_experts": 4, "num_experts": 4}, 4), ({}, 64)]
)
def test_num_local_experts_is_another_name_of_num_experts(keys, experts):
    name, config = config_from_json({"model_type": "olmoe", "num_experts_per_tok": 2} | keys, "here")
    assert (name, config.num_experts, config.experts_per_token) == ("olmoe", experts, 2)
    transformers = pytest.importorskip("transformers")
    assert transformers.OlmoeConfig(**keys).num_experts == experts


MISSING = "model.layers.1.mlp.experts.5.up_proj.weight"
EXTRA = "model.layers.2.mlp.experts.8.down_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


def _set(name, value):
    return lambda arrays: arrays.update({name: value(arrays)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop(MISSING), f"olmoe: {MISSING} is in no file, but config.json asks for it"),
        (lambda arrays: arrays.pop(ROUTER), f"olmoe: {ROUTER} is in no file"),
        (_set(EXTRA, lambda arrays: np.ones((32, 72), np.float32)), f"safetensors: {EXTRA}: a model of this config"),
        (
            _set(MISSING, lambda arrays: arrays[MISSING].T.copy()),
            f"safetensors: {MISSING}: shape (32, 72), but config.json asks for (72, 32)",
        ),
        (
            _set(MISSING, lambda arrays: arrays[MISSING][None]),
            f"safetensors: {MISSING}: shape (1, 72, 32), but config.json asks for (72, 32)",
        ),
        (
            _set(ROUTER, lambda arrays: arrays[ROUTER][:4]),
            f"safetensors: {ROUTER}: shape (4, 32), but config.json asks for (8, 32)",
        ),
        (_set(MISSING, lambda arrays: arrays[MISSING] * np.nan), f"safetensors: {MISSING}: holds NaN or Inf"),
    ],
)
def test_an_experts_tensor_that_does_not_fit_is_refused_by_name(copy, change, message):
    with pytest.raises(hn.UserError, match=re.escape(message)) as raised:
        load_huggingface(copy(change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts": 0}, "config.json: num_experts=0: must be at least 1"),
        ({"num_experts": -1}, "config.json: num_experts=-1: must be at least 1"),
        ({"num_experts": None, "num_local_experts": 0}, "config.json: num_local_experts=0: must be at least 1"),
        ({"num_experts": 8.0}, "config.json: num_experts=8.0 must be of type int"),
        ({"num_local_experts": 4}, "num_experts=8, but num_local_experts, another name of it, is 4"),
        ({"num_experts_per_tok": 9}, "model.experts_per_token=9: must be between 1 and model.num_experts=8"),
        ({"num_experts_per_tok": 0}, "model.experts_per_token=0: must be at least 1 and at most 65,536"),
        ({"norm_topk_prob": 1}, "config.json: norm_topk_prob=1 must be of type bool"),
        ({"n_shared_experts": 1}, "config.json: n_shared_experts=1 is not known for olmoe"),
        ({"num_experts": 7}, "shape (8, 32), but config.json asks for (7, 32)"),
        ({"num_experts": 9}, "shape (8, 32), but config.json asks for (9, 32)"),
        # Beyond any memory, were all the tensors it claims listed before the first is looked for.
        ({"num_experts": 2**31 - 1}, "model.num_experts=2147483647: must be at least 0 and at most 65,536"),
    ],
)
def test_experts_that_cannot_be_are_refused(copy, keys, message):
    with pytest.raises(hn.UserError, match=re.escape(message)) as raised:
        load_huggingface(copy(**keys))
    assert "\n" not in str(raised.value)


# ---- Out


MOE = {"scheme": "pre_qk_projection", "num_experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("olmoe", {"scheme": "hybrid_star"}, "olmoe cannot express model.scheme=hybrid_star"),
        ("olmoe", {"shared_experts": 2}, "olmoe cannot express model.shared_experts=2"),
        ("olmoe", {"balance_bias": True}, "olmoe cannot express model.balance_bias=true"),
        ("olmoe", {"mlp_bias": True}, "olmoe cannot express model.mlp_bias=true"),
        ("olmoe", {"head_bias": True}, "olmoe cannot express model.head_bias=true"),
        ("olmoe", {"norm": "crmsnorm"}, "olmoe cannot express model.norm=crmsnorm"),
        # What a dense architecture would express, were it not for the experts.
        ("llama", {"scheme": "pre"}, "llama cannot express model.num_experts=4"),
        ("qwen3", {"scheme": "pre_qk_pre"}, "qwen3 cannot express model.num_experts=4"),
        ("olmo2", {"scheme": "reordered"}, "olmo2 cannot express model.num_experts=4"),
        ("olmoe", {"scheme": "pre"}, "olmoe cannot express model.scheme=pre"),
    ],
)
def test_experts_that_an_architecture_does_not_have_are_not_saved_as_it(
    tmp_path, small_config, random_params, architecture, keys, message
):
    config = small_config(**MOE | keys)
    with pytest.raises(hn.UserError, match=f"^{re.escape(message)}") as raised:
        save_huggingface(tmp_path / "out", config, random_params(config), architecture=architecture)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert config_to_json(config)[0] != architecture


def test_a_dense_model_is_no_olmoe(small_config):
    dense = small_config(scheme="pre_qk_projection")
    with pytest.raises(hn.UserError, match=r"^olmoe cannot express model\.num_experts=0$"):
        config_to_json(dense, "olmoe")
    assert config_to_json(dense)[0] == "hybridnorm"


def test_experts_are_an_olmoes_alone(small_config):
    """No table of another architecture has a place for them, were its config.json to claim the model."""
    config = small_config(**MOE)
    assert config_to_json(config)[0] == "olmoe"
    for name in ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "olmo2", "mixtral", "gpt_oss"):
        with pytest.raises(hn.UserError, match="this architecture has no tensor for this parameter of the model"):
            list(ARCHITECTURES[name].tensors.places(config))


def test_what_decides_the_logits_of_experts(small_config):
    config = small_config(**MOE)
    decisive = {"num_experts": 5, "experts_per_token": 1, "shared_experts": 1}
    decisive |= {"normalize_expert_weights": True, "balance_bias": True}
    for key, value in decisive.items():
        changed = mathematics(dataclasses.replace(config, **{key: value}))
        assert [name for name, before in mathematics(config).items() if changed[name] != before] == [key]
    assert mathematics(dataclasses.replace(config, expert_dispatch="ragged")) == mathematics(config)
    assert not mathematics(small_config(scheme="pre")).keys() & (decisive.keys() - {"num_experts"})


@pytest.mark.parametrize(("limit", "count"), [(1, 102), (50_000, 16)])
def test_shards_may_part_the_experts_of_a_layer(tmp_path, limit, count):
    config, params = load_huggingface(OLMOE)
    save_huggingface(tmp_path / "out", config, params, max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == count
    original = load_file(OLMOE / "model.safetensors")
    written = {name: array for file in files for name, array in load_file(file).items()}
    assert {name: array.tobytes() for name, array in written.items()} == {
        name: array.tobytes() for name, array in original.items()
    }
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(tmp_path / "out")[1], params)
