"""Hugging Face checkpoints: their logits are reproduced, and what is written back is bit for bit what was read."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json
from hybridnorm_jax.interop.huggingface import load_huggingface, save_huggingface
from hybridnorm_jax.interop.tensor_places import leaf_shapes
from hybridnorm_jax.model import rotation

GOLDENS = Path(__file__).parents[1] / "goldens"
SHARDED = "hf_olmo2_bf16_sharded"
# directory -> its scheme, and some of what its config.json says.
CASES = {
    "hf_gpt2": ("pre", {"activation": "gelu_tanh", "tie_embeddings": True, "max_positions": 32}),
    "hf_gpt_neox": ("pre", {"activation": "gelu", "rotary_dim": 4, "rope_theta": 1e4}),
    "hf_gpt_neox_old_config": ("parallel", {"rotary_dim": 4, "rope_theta": 25e3}),
    "hf_opt": ("pre", {"activation": "relu", "position_offset": 2}),
    "hf_llama": ("pre", {"norm_eps": 1e-6, "num_kv_heads": 2}),
    "hf_llama_old_config": ("pre", {"rope_theta": 5e4}),
    "hf_llama_tied_theta": ("pre", {"norm_eps": 1e-3, "rope_theta": 5e5, "tie_embeddings": True}),
    "hf_qwen3": ("pre_qk_pre", {"head_dim": 8}),
    "hf_qwen3_head_dim": ("pre_qk_pre", {"head_dim": 16, "rope_theta": 5e5}),
    "hf_olmo2": ("reordered", {"norm_eps": 1e-5}),
    "hf_olmoe": ("pre_qk_projection", {"num_experts": 8, "experts_per_token": 3, "normalize_expert_weights": False}),
    SHARDED: ("reordered", {"param_dtype": "bfloat16"}),
}


def logits_of(config, params, tokens):
    return np.asarray(jax.jit(hn.Decoder(config).apply)({"params": params}, tokens))


def golden_of(name, file="golden.npz"):
    with np.load(GOLDENS / name / file) as arrays:
        return dict(arrays)


def stored_tensors(directory):
    """Every tensor of a directory's safetensors files: name -> (dtype, shape, bytes)."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                array = tensors.get_tensor(name)
                assert name not in found
                found[name] = array.dtype, array.shape, array.tobytes()
    return found


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


# ---- In


@pytest.mark.parametrize("name", [name for name in CASES if name != SHARDED])
def test_logits_are_those_of_transformers(name):
    config, params = load_huggingface(GOLDENS / name)
    scheme, keys = CASES[name]
    assert config.scheme == scheme
    assert {key: getattr(config, key) for key in keys} == keys
    golden = golden_of(name)
    np.testing.assert_allclose(logits_of(config, params, golden["tokens"]), golden["logits"], rtol=0, atol=1e-5)


def test_logits_of_a_bfloat16_checkpoint_are_those_of_transformers_in_float32():
    config, params = load_huggingface(GOLDENS / SHARDED)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    golden = golden_of(SHARDED, "golden_float32_rotation.npz")
    np.testing.assert_allclose(logits_of(config, params, golden["tokens"]), golden["logits"], rtol=0, atol=1e-5)


def test_the_other_golden_of_the_bfloat16_checkpoint_differs_by_a_rounded_rotation_alone(monkeypatch):
    """Its torch model had been bfloat16 as a whole, the buffer of inverse wavelengths included."""
    config, params = load_huggingface(GOLDENS / SHARDED)
    golden = golden_of(SHARDED)

    def rounded(positions, rotary_dim, theta, dtype):
        inverse = 1 / theta ** (jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
        angles = positions[:, :, None, None] * inverse.astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.cos(angles), jnp.sin(angles)

    exact = logits_of(config, params, golden["tokens"])
    monkeypatch.setattr(rotation, "rotation", rounded)
    np.testing.assert_allclose(logits_of(config, params, golden["tokens"]), golden["logits"], rtol=0, atol=1e-5)
    assert np.abs(exact - golden["logits"]).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_converts_while_reading(dtype):
    _, stored = load_huggingface(GOLDENS / "hf_llama")
    config, params = load_huggingface(GOLDENS / "hf_llama", dtype=dtype)
    assert (config.param_dtype, config.dtype) == (dtype, "float32")
    assert_same_bits(params, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), stored))


def test_a_float16_checkpoint_stays_float16(tmp_path):
    source = edited(tmp_path, "hf_gpt_neox", tensor=lambda name, array: array.astype(np.float16))
    config, params = load_huggingface(source)
    assert config.param_dtype == "float16"
    _, wide = load_huggingface(GOLDENS / "hf_gpt_neox")
    assert_same_bits(params, jax.tree.map(lambda leaf: leaf.astype(np.float16), wide))
    save_huggingface(tmp_path / "again", config, params)
    assert stored_tensors(tmp_path / "again") == stored_tensors(source)


def edited(tmp_path, name, config=None, tensor=None, rename=lambda name: name, add=None):
    """A copy of an unsharded golden with keys of config.json set, arrays replaced, renamed and added."""
    directory = tmp_path / "edited"
    directory.mkdir(exist_ok=True)
    document = json.loads((GOLDENS / name / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(document))
    arrays = {}
    with safe_open(GOLDENS / name / "model.safetensors", framework="np") as tensors:
        for key in tensors.keys():  # noqa: SIM118  (no mapping)
            array = tensors.get_tensor(key)
            arrays[rename(key)] = np.ascontiguousarray(tensor(key, array)) if tensor else array
    save_file(arrays | (add or {}), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("name", "prefix"), [("hf_gpt2", "transformer."), ("hf_opt", "model.")])
def test_files_of_the_bare_model_lack_the_prefix(tmp_path, name, prefix):
    source = edited(tmp_path, name, rename=lambda key: key.removeprefix(prefix))
    assert not any(key.startswith(prefix) for key in stored_tensors(source))
    assert_same_bits(load_huggingface(source)[1], load_huggingface(GOLDENS / name)[1])


BUFFERS = {
    "hf_gpt2": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    "hf_gpt_neox": (
        "gpt_neox.layers.{}.attention.bias",
        "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
    ),
    "hf_llama": ("model.layers.{}.self_attn.rotary_emb.inv_freq",),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_in_the_file_are_passed_over(tmp_path, name):
    add = {template.format(layer): np.zeros((1, 4), np.uint8) for template in BUFFERS[name] for layer in range(3)}
    assert_same_bits(load_huggingface(edited(tmp_path, name, add=add))[1], load_huggingface(GOLDENS / name)[1])


def test_a_tied_model_may_hold_its_head_as_well(tmp_path):
    _, params = load_huggingface(GOLDENS / "hf_gpt2")
    head = params["token_embedding"]["embedding"].copy()
    source = edited(tmp_path, "hf_gpt2", add={"lm_head.weight": head})
    assert_same_bits(load_huggingface(source)[1], params)
    head[3, 4] = np.nextafter(head[3, 4], np.inf)
    source = edited(tmp_path, "hf_gpt2", add={"lm_head.weight": head})
    with pytest.raises(hn.UserError, match=r"lm_head\.weight: is not transformer\.wte\.weight, but config\.json says"):
        load_huggingface(source)


def test_ignored_keys_are_read_as_if_absent(tmp_path):
    source = edited(tmp_path, "hf_llama", config={"house_style": 3, "sliding_window": 4096})
    with pytest.raises(hn.UserError, match=r"house_style=3 is not known for llama .* ignore_keys=\['house_style'\]"):
        load_huggingface(source, ignore_keys=["sliding_window"])
    with pytest.raises(hn.UserError, match="sliding_window=4096 is not implemented for llama"):
        load_huggingface(source, ignore_keys=["house_style"])
    config, _ = load_huggingface(source, ignore_keys=["house_style", "sliding_window"])
    assert config == load_huggingface(GOLDENS / "hf_llama")[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_absent_keys_have_the_values_of_the_class_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(name).to_dict()
    assert len(written) > 20
    assert config_from_json(written, "all keys") == config_from_json({"model_type": name}, "no keys")


# What published config.json files hold beside the sizes: GPT-2 medium, Pythia, OPT, SmolLM2, Qwen3, OLMo 2, OLMoE.
PUBLISHED = {
    "gpt2": """n_ctx=1024 n_special=0 predict_special_tokens=true initializer_range=0.02 summary_activation=null
        summary_first_dropout=0.1 summary_proj_to_labels=true summary_type="cls_index" summary_use_proj=true
        task_specific_params={"text-generation":{"do_sample":true}} bos_token_id=50256 attn_pdrop=0.1""",
    "gpt_neox": """rotary_emb_base=10000 rotary_pct=0.25 torch_dtype="float16" transformers_version="4.24.0"
        use_cache=true use_parallel_residual=true initializer_range=0.02 layer_norm_eps=1e-05""",
    "opt": """_name_or_path="opt-125m" activation_dropout=0.0 layerdrop=0.0 init_std=0.02 prefix="</s>" dropout=0.1
        do_layer_norm_before=true word_embed_proj_dim=768 _remove_final_layer_norm=false""",
    "llama": """is_llama_config=true pretraining_tp=1 rope_interleaved=false rope_scaling=null rope_theta=100000
        torch_dtype="bfloat16" attention_dropout=0.0""",
    "qwen3": """max_window_layers=28 sliding_window=null use_sliding_window=false rope_scaling=null rope_theta=1000000
        attention_bias=false head_dim=128 tie_word_embeddings=true""",
    "olmo2": """attention_bias=false rope_scaling=null rope_theta=500000 pad_token_id=100277 rms_norm_eps=1e-06""",
    "olmoe": """attention_bias=false clip_qkv=null norm_topk_prob=false num_experts=64 num_experts_per_tok=8
        output_router_logits=false router_aux_loss_coef=0.01 rope_scaling=null rope_theta=10000.0""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_models_are_known(name):
    pairs = (pair.split("=", 1) for pair in PUBLISHED[name].split())
    document = {"model_type": name} | {key: json.loads(value) for key, value in pairs}
    _, config = config_from_json(document, "published")
    if config.positions == "rope":
        assert config.rope_theta == document.get("rope_theta", 10000)


# ---- Out


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise(tmp_path, name):
    config, params = load_huggingface(GOLDENS / name)
    save_huggingface(tmp_path / "out", config, jax.tree.map(jnp.asarray, params))
    again, read = load_huggingface(tmp_path / "out")
    assert again == config
    assert_same_bits(read, params)
    assert stored_tensors(tmp_path / "out") == stored_tensors(GOLDENS / name)
    said, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDENS / name))
    assert (said["model_type"], said["architectures"]) == (original["model_type"], original["architectures"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("limit", "files"), [(1, 36), (20_000, 9), (10**9, 1)])
def test_shards_hold_so_many_bytes_or_one_tensor(tmp_path, limit, files):
    config, params = load_huggingface(GOLDENS / "hf_qwen3")
    (tmp_path / "out").mkdir()
    save_huggingface(tmp_path / "out", config, params, max_shard_bytes=limit)
    original = stored_tensors(GOLDENS / "hf_qwen3")
    assert stored_tensors(tmp_path / "out") == original
    assert_same_bits(load_huggingface(tmp_path / "out")[1], params)
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            held[file.name] = [len(original[name][2]) for name in tensors.keys()]  # noqa: SIM118  (no mapping)
    assert len(held) == files
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held.values())
    if files > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, held.values()))
        assert set(index["weight_map"].values()) == set(held)


def test_all_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    config, params = load_huggingface(GOLDENS / "hf_qwen3")
    save_huggingface(tmp_path / "out", config, params)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


LAYER_NORM = {"norm": "layernorm", "norm_bias": True, "num_kv_heads": 4}
LEARNED = {**LAYER_NORM, "positions": "learned", "max_positions": 16, "attention_bias": True, "mlp_bias": True}
OPT_BARE = {**LEARNED, "position_offset": 2, "attention_bias": False, "mlp_bias": False}
EXPERTS = {"scheme": "pre_qk_projection", "num_experts": 6}
# Models of our own: architecture -> keys.
OWN = {
    "gpt2": ("gpt2", {**LEARNED, "scheme": "pre", "activation": "gelu", "norm_eps": 1e-6}),
    "gpt2 untied with few layers of mix_ln": ("gpt2", {**LEARNED, "scheme": "mix_ln", "activation": "relu"}),
    "gpt_neox": ("gpt_neox", {**LAYER_NORM, "scheme": "pre", "activation": "gelu_tanh", "mlp_bias": True}),
    "pythia": (
        "gpt_neox",
        {**LAYER_NORM, "scheme": "parallel", "activation": "gelu", "mlp_bias": True, "rotary_dim": 2},
    ),
    "opt": ("opt", {**LEARNED, "scheme": "pre", "position_offset": 2, "activation": "gelu", "tie_embeddings": True}),
    "opt without biases": ("opt", {**OPT_BARE, "scheme": "pre", "activation": "relu"}),
    "opt with bare norms": (
        "opt",
        {**OPT_BARE, "scheme": "pre", "activation": "relu", "norm_scale": False, "norm_bias": False},
    ),
    "llama": ("llama", {"scheme": "pre", "attention_bias": True, "mlp_bias": True, "head_dim": 16, "norm_eps": 1e-4}),
    "qwen3": ("qwen3", {"scheme": "pre_qk_pre", "attention_bias": True, "tie_embeddings": True}),
    "olmo2": ("olmo2", {"scheme": "reordered", "attention_bias": True, "rope_theta": 1e6}),
    "olmoe": ("olmoe", {**EXPERTS, "experts_per_token": 2, "attention_bias": True, "rope_theta": 1e6}),
    "olmoe with normalized weights": (
        "olmoe",
        {**EXPERTS, "experts_per_token": 5, "normalize_expert_weights": True, "tie_embeddings": True},
    ),
    "olmoe of one expert": ("olmoe", {**EXPERTS, "num_experts": 1, "experts_per_token": 1, "num_kv_heads": 4}),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ours_goes_out_and_comes_back(tmp_path, small_config, random_params, tokens, name):
    architecture, keys = OWN[name]
    config = small_config(**keys)
    params = random_params(config)
    extra = {"bos_token_id": 7} | ({} if config.positions == "learned" else {"max_position_embeddings": 99})
    save_huggingface(tmp_path / "out", config, params, extra=extra)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["model_type"] == architecture
    assert {key: document[key] for key in extra} == extra
    back, read = load_huggingface(tmp_path / "out")
    assert_same_bits(read, params)
    np.testing.assert_array_equal(logits_of(back, read, tokens), logits_of(config, params, tokens))


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_transformers_computes_the_same_from_what_we_write(tmp_path, small_config, random_params, tokens, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if name in CASES:
        config, params = load_huggingface(GOLDENS / name)
        golden = golden_of(name, "golden_float32_rotation.npz" if name == SHARDED else "golden.npz")
        tokens, expected = golden["tokens"], golden["logits"]
    else:
        config = small_config(**OWN[name][1])
        params = random_params(config)
        expected = logits_of(config, params, tokens)
    save_huggingface(tmp_path / "out", config, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()
    print(f"{name}: largest difference {np.abs(theirs - expected).max():.1e}")
    # Our own models' logits are larger than the goldens', and float32's steps with them.
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max() / 3))


# ---- How


@pytest.mark.parametrize("name", CASES)
def test_every_element_of_a_tensor_is_one_of_ours(name):
    """The views that both directions go through overlap nowhere and leave nothing out."""
    config, _ = load_huggingface(GOLDENS / name)
    document = json.loads((GOLDENS / name / "config.json").read_text())
    filled = {path: np.zeros(shape, bool) for path, shape in leaf_shapes(config).items()}
    for place in ARCHITECTURES[document["model_type"]].tensors.places(config):
        tensor = np.arange(place.size).reshape(place.shape)
        read = [np.full(piece.shape, -1) for piece in place.slices]
        place.read(tensor, read)
        assert np.array_equal(np.sort(np.concatenate([each.ravel() for each in read])), np.arange(tensor.size))
        written = np.full(place.shape, -1)
        place.write(written, read)
        assert np.array_equal(written, tensor)
        for target in place.targets(filled):
            assert not target.any()
            target[...] = True
    assert all(leaf.all() for leaf in filled.values())


def test_what_does_not_change_the_model_does_not_hinder_saving(tmp_path):
    """Another compute dtype, backend or remat is the same model."""
    config, params = load_huggingface(GOLDENS / "hf_olmoe")
    backends = {"attention": "xla", "expert_dispatch": "ragged"}
    other = dataclasses.replace(config, dtype="bfloat16", remat="full", dropout=0.1, init_std=0.5, **backends)
    save_huggingface(tmp_path / "out", other, params)
    assert load_huggingface(tmp_path / "out")[0] == config
