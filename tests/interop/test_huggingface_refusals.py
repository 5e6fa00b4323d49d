"""Hugging Face directories that are damaged or not understood are refused in one line that names what is wrong."""

import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import load_huggingface

GOLDENS = Path(__file__).parents[1] / "goldens"
SHARDED = "hf_olmo2_bf16_sharded"
SECOND_SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def refused(tmp_path):
    """Asserts that loading tmp_path/<golden> raises one line that matches."""

    def check(name, match, **keys):
        with pytest.raises(hn.UserError, match=match) as raised:
            load_huggingface(tmp_path / name, **keys)
        assert "\n" not in str(raised.value)

    return check


@pytest.fixture
def copy(tmp_path):
    """Copies a golden to tmp_path/<name>; keys of config.json given as arguments are set."""

    def make(name, **config):
        directory = tmp_path / name
        shutil.copytree(GOLDENS / name, directory, dirs_exist_ok=True)
        document = json.loads((GOLDENS / name / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(document))
        return directory

    return make


def change_tensors(directory, change):
    """Let `change` edit the dict of arrays of model.safetensors."""
    arrays = load_file(directory / "model.safetensors")
    change(arrays)
    save_file(arrays, directory / "model.safetensors")


# ---- config.json

NOT_IMPLEMENTED = {
    "hf_gpt2": {
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
        "activation_function": "gelu_10",
        "is_encoder_decoder": True,
        "pruned_heads": {"0": [1]},
    },
    "hf_gpt_neox": {"hidden_act": "mish", "quantization_config": {"bits": 4}},
    "hf_opt": {
        "do_layer_norm_before": False,
        "_remove_final_layer_norm": True,
        "word_embed_proj_dim": 16,
    },
    "hf_llama": {
        "hidden_act": "gelu_10",
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "is_causal": False,
    },
    "hf_olmo2": {"clip_qkv": 8.0},
    "hf_olmoe": {"clip_qkv": 8.0, "hidden_act": "gelu_10", "quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NOT_IMPLEMENTED.items() for key in keys])
def test_a_key_that_changes_the_mathematics_is_refused_by_name(copy, refused, name, key):
    value = NOT_IMPLEMENTED[name][key]
    copy(name, **{key: value})
    refused(name, re.escape(f"config.json: {key}={value!r}") + ".* is not implemented")


ROPE_REFUSALS = [
    ("hf_llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic' is not impl"),
    ("hf_llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor=None must be a number"),
    ("hf_llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_scaling.rope_type='yarn', but type="),
    (
        "hf_qwen3",
        {"rope_parameters": {"rope_type": "default", "factor": 8}},
        "rope_parameters.factor=8: rope_type=default has no such key",
    ),
    ("hf_llama", {"rope_theta": 5.0}, "rope_theta=5.0, but elsewhere in the file it is 10000.0"),
    ("hf_llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4' must be a number"),
    ("hf_llama", {"rope_scaling": 2}, "rope_scaling=2 must be a mapping"),
    ("hf_llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture rotates whole heads"),
    ("hf_gpt_neox", {"rotary_pct": 0.25}, "rotary_pct=0.25, but elsewhere in the file it is 0.5"),
]


@pytest.mark.parametrize(("name", "config", "match"), ROPE_REFUSALS)
def test_another_rotation_is_refused_by_name(copy, refused, name, config, match):
    copy(name, **config)
    refused(name, re.escape(match))


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 10000}])
def test_the_plain_rotation_may_be_spelled_out(copy, scaling):
    config, _ = load_huggingface(copy("hf_llama", rope_scaling=scaling))
    assert config == load_huggingface(GOLDENS / "hf_llama")[0]


SUPPORTED = "supported: gpt2, gpt_bigcode, gpt_neo, gptj, codegen, gpt_neox, opt"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "mamba"}, f"model_type='mamba' is not supported; {SUPPORTED}"),
        ({"model_type": "t5"}, f"model_type='t5' is not supported; {SUPPORTED}"),
        ({"model_type": None}, f"model_type=None is not supported; {SUPPORTED}"),
        ({"alibi": True, "n": "a\nb"}, "alibi=True is not known for llama and might change what the model computes"),
        ({"chat": "line\nline"}, r"chat='line\\nline' is not known"),
        ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        ({"hidden_size": True}, "hidden_size=True must be of type int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be of type bool"),
        ({"rms_norm_eps": None}, "rms_norm_eps=null, but a value is needed"),
        ({"num_key_value_heads": 3}, "config.json: model.num_kv_heads=3: must divide"),
        ({"num_hidden_layers": 0}, "config.json: model.num_layers=0: must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(copy, refused, config, match):
    copy("hf_llama", **config)
    refused("hf_llama", re.escape(match) if "\\" not in match else match)


@pytest.mark.parametrize(
    ("text", "match"),
    [(None, "no such file"), ("{\n\n'a'", "cannot be read as JSON"), ("[1]", "must hold a mapping")],
)
def test_config_json_must_be_there_and_be_json(copy, refused, text, match):
    file = copy("hf_llama") / "config.json"
    file.unlink() if text is None else file.write_text(text)
    refused("hf_llama", rf"config\.json: {match}")


# ---- Files


def test_no_such_directory(refused):
    refused("nowhere", "nowhere: no such directory")


def test_an_unknown_dtype(copy, refused):
    copy("hf_llama")
    refused("hf_llama", "dtype=int8: not known", dtype="int8")


def test_a_pickle_is_never_read(copy, refused):
    directory = copy("hf_llama")
    (directory / "model.safetensors").unlink()
    refused("hf_llama", "holds neither model.safetensors nor")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused("hf_llama", r"pytorch_model\.bin: a pickle, .* never read; convert it to safetensors")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
@pytest.mark.parametrize(("name", "file"), [("hf_llama", "model.safetensors"), (SHARDED, SECOND_SHARD)])
def test_a_truncated_file(copy, refused, name, file, keep):
    path = copy(name) / file
    path.write_bytes(path.read_bytes()[:keep])
    refused(name, rf"{file}: damaged or cut off: \w")


def test_a_missing_shard(copy, refused):
    (copy(SHARDED) / SECOND_SHARD).unlink()
    refused(SHARDED, f"{SECOND_SHARD}: no such file, but {INDEX} names it")


def test_an_index_that_names_a_tensor_its_file_does_not_hold(copy, refused):
    file = copy(SHARDED) / INDEX
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = SECOND_SHARD
    file.write_text(json.dumps(index))
    refused(SHARDED, rf"{SECOND_SHARD}: does not hold lm_head\.weight, which {INDEX} places there")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", f"{INDEX}: cannot be read as JSON"),
        ("{}", f"{INDEX}: weight_map must map"),
        ('{"weight_map": {"a": 1}}', f"{INDEX}: weight_map must map"),
        ('{"weight_map": {"a": "../b"}}', rf"{INDEX}: weight_map\.a=\.\./b must be the name of a file beside it"),
    ],
)
def test_an_index_that_is_none(copy, refused, text, match):
    (copy(SHARDED) / INDEX).write_text(text)
    refused(SHARDED, match)


def test_one_tensor_in_two_files(copy, refused):
    directory = copy(SHARDED)
    first = load_file(directory / "model-00001-of-00003.safetensors")
    path = directory / SECOND_SHARD
    name = "model.embed_tokens.weight"
    save_file(load_file(path) | {name: first[name]}, path)
    refused(SHARDED, rf"{SECOND_SHARD}: model\.embed_tokens\.weight is also in .*model-00001-of-00003\.safetensors")


# ---- Tensors

KERNEL = "model.layers.1.self_attn.k_proj.weight"


def _set(value):
    def change(arrays):
        arrays[KERNEL] = value(arrays[KERNEL])

    return change


def _with(index, value):
    def replace(array):
        array = array.copy()
        array[index] = value
        return array

    return replace


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda arrays: arrays.pop(KERNEL), rf"hf_llama: {KERNEL} is in no file, but config\.json asks for it"),
        (lambda arrays: arrays.pop("lm_head.weight"), r"hf_llama: lm_head\.weight is in no file"),
        (lambda arrays: arrays.update(score=np.ones(3, np.float32)), "safetensors: score: .* has no place for it"),
        (
            lambda arrays: arrays.update({KERNEL.replace("weight", "bias"): np.ones(16, np.float32)}),
            r"safetensors: model\.layers\.1\.self_attn\.k_proj\.bias: .* has no place for it",
        ),
        (_set(lambda a: a[:8]), rf"safetensors: {KERNEL}: shape \(8, 32\), but config\.json asks for \(16, 32\)"),
        (_set(lambda a: a.T.copy()), rf"safetensors: {KERNEL}: shape \(32, 16\), but config\.json"),
        (_set(lambda a: a.astype(np.int8)), rf"safetensors: {KERNEL}: dtype I8 must be one of F64, F32, BF16, F16"),
        (_set(lambda a: a.astype(ml_dtypes.float8_e4m3fn)), rf"safetensors: {KERNEL}: dtype F8_E4M3 must be one of"),
        (_set(_with((3, 4), np.nan)), rf"safetensors: {KERNEL}: holds NaN or Inf"),
        (_set(_with((15, 31), -np.inf)), rf"safetensors: {KERNEL}: holds NaN or Inf"),
        (
            _set(lambda a: a.astype(np.float16)),
            r"hf_llama: tensors of several dtypes \(float16, float32\); pass dtype=",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name_and_file(copy, refused, change, match):
    change_tensors(copy("hf_llama"), change)
    refused("hf_llama", match.replace(KERNEL, re.escape(KERNEL)))


def test_nan_in_bfloat16(copy, refused):
    directory = copy(SHARDED)
    arrays = load_file(directory / SECOND_SHARD)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name][5, 6] = np.nan
    save_file(arrays, directory / SECOND_SHARD)
    refused(SHARDED, rf"{SECOND_SHARD}: {re.escape(name)}: holds NaN or Inf")


def test_a_value_beyond_the_asked_dtype(copy, refused):
    change_tensors(copy("hf_llama"), _set(_with((0, 0), 1e6)))
    refused("hf_llama", rf"{re.escape(KERNEL)}: holds NaN or Inf, read as float16", dtype="float16")


def test_tensors_of_several_dtypes_can_be_converted(copy):
    directory = copy("hf_llama")
    change_tensors(directory, _set(lambda array: array.astype(np.float16)))
    config, params = load_huggingface(directory, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert config.param_dtype == "float32"


def test_a_tied_head_of_another_shape(copy, refused):
    change_tensors(copy("hf_gpt2"), lambda arrays: arrays.update({"lm_head.weight": np.ones((60, 32), np.float32)}))
    refused("hf_gpt2", r"lm_head\.weight: shape \(60, 32\), but config\.json asks for \(61, 32\)")


# ---- What a directory says it is


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        (None, "architectures is missing; it must be ['LlamaForCausalLM']"),
        ([], "architectures=[] must be ['LlamaForCausalLM']"),
        (["LlamaForCausalLM", "GPT2LMHeadModel"], "architectures=['LlamaForCausalLM', 'GPT2LMHeadModel'] must be"),
        ("LlamaForCausalLM", "architectures='LlamaForCausalLM' must be ['LlamaForCausalLM']"),
        (["LlamaForSequenceClassification"], "architectures=['LlamaForSequenceClassification']: with model_type=llama"),
        (["GPT2LMHeadModel"], "architectures=['GPT2LMHeadModel']: with model_type=llama it must be"),
    ],
)
def test_config_json_names_the_one_class_of_its_tensors(copy, refused, stated, match):
    directory = copy("hf_llama")
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(document | {"architectures": stated}))
    refused("hf_llama", re.escape(match))
    assert load_huggingface(directory, ignore_keys=["architectures"])[0].num_heads == 4


def test_of_a_wrong_model_type_the_class_is_named_and_no_key_to_ignore(copy, refused):
    copy("hf_gpt2", model_type="llama")
    refused("hf_gpt2", re.escape("architectures=['GPT2LMHeadModel']: with model_type=llama it must be"))


def test_a_model_without_its_head_is_read_where_the_head_is_tied(copy):
    directory = copy("hf_gpt2", architectures=["GPT2Model"])
    assert load_huggingface(directory)[0].tie_embeddings


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_by_name(copy, refused, file):
    (copy("hf_llama") / file).write_text("{}")
    refused("hf_llama", f"{file}: an adapter, not a whole model; merge it into its model")


def test_a_vocabulary_larger_than_the_table_is_refused(copy, refused):
    copy("hf_llama", vocab_size=62)
    refused("hf_llama", re.escape("model.embed_tokens.weight: shape (61, 32), but config.json asks for (62, 32)"))


def test_matrices_of_float16_and_norms_of_float32_are_read_with_a_dtype(copy, refused):
    """As some GPT-2 are stored."""
    directory = copy("hf_gpt2")

    def halve(arrays):
        for name, array in arrays.items():
            if array.ndim > 1:
                arrays[name] = array.astype(np.float16)

    change_tensors(directory, halve)
    refused("hf_gpt2", "tensors of several dtypes")
    _, params = load_huggingface(directory, dtype="float32")
    _, exact = load_huggingface(GOLDENS / "hf_gpt2")
    np.testing.assert_array_equal(params["final_norm"]["scale"], exact["final_norm"]["scale"])
    table = exact["token_embedding"]["embedding"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(params["token_embedding"]["embedding"], table)


@pytest.mark.parametrize("path", [None, 3, b"hf_llama", ""], ids=repr)
def test_what_is_no_path_is_called_so(path):
    with pytest.raises(hn.UserError, match=r"path=.*: must be the path of a directory with a config\.json"):
        hn.load_huggingface(path)


@pytest.mark.parametrize("keys", ["hidden_size", None, 3])
def test_keys_to_ignore_are_a_list(keys):
    """A text was taken for all keys that are a part of it."""
    with pytest.raises(hn.UserError, match=r"ignore_keys=.*: must be a list of keys, such as \['KEY'\]"):
        hn.load_huggingface(GOLDENS / "hf_llama", ignore_keys=keys)
