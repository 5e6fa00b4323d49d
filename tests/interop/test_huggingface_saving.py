"""What cannot be written for Hugging Face is refused in one line, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop import safetensors_files
from hybridnorm_jax.interop.architectures import ALL
from hybridnorm_jax.interop.huggingface import load_huggingface, save_huggingface

GOLDENS = Path(__file__).parents[1] / "goldens"
SUPPORTED = f"supported: {', '.join(ALL)}"


@pytest.fixture
def refuses_to_save(tmp_path):
    """Asserts that saving raises one line that matches, and leaves the directory as it was."""

    def check(match, config, params, **keys):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(hn.UserError, match=match) as raised:
            save_huggingface(tmp_path / "deep" / "out", config, params, **keys)
        assert "\n" not in str(raised.value)
        assert sorted(tmp_path.rglob("*")) == before

    return check


BIASED = {"norm": "layernorm", "norm_bias": True, "num_kv_heads": 4, "mlp_bias": True, "activation": "gelu"}


@pytest.mark.parametrize(
    ("architecture", "keys", "match"),
    [
        ("llama", {"scheme": "hybrid_star"}, "^llama cannot express model.scheme=hybrid_star$"),
        ("llama", {"scheme": "pre", "norm": "crmsnorm"}, "llama cannot express model.norm=crmsnorm"),
        ("llama", {"scheme": "pre", "norm_bias": True}, "llama cannot express model.norm_bias=true"),
        ("llama", {"scheme": "pre", "norm_scale": False}, "llama cannot express model.norm_scale=false"),
        ("llama", {"scheme": "pre", "head_bias": True}, "llama cannot express model.head_bias=true"),
        ("llama", {"scheme": "pre", "embedding_norm": "true"}, "llama cannot express model.embedding_norm=true"),
        ("llama", {"scheme": "pre", "rotary_dim": 4}, "llama cannot express model.rotary_dim=4"),
        (
            "qwen3",
            {"scheme": "pre_qk_pre", "attention_norm_bias": True},
            "qwen3 cannot express model.attention_norm_bias=",
        ),
        ("olmo2", {"scheme": "reordered", "mlp_bias": True}, "olmo2 cannot express model.mlp_bias=true"),
        ("gpt_neox", {"scheme": "pre", **BIASED, "norm_bias": False}, "gpt_neox cannot express model.norm_bias=false"),
        ("llama", {"scheme": "reordered"}, "^llama cannot express model.scheme=reordered"),
        ("qwen3", {"scheme": "pre"}, "^qwen3 cannot express model.scheme=pre$"),
        (
            "gpt2",
            {"scheme": "pre"},
            "^gpt2 cannot express model.num_kv_heads=2 or model.activation=swiglu or model.norm=",
        ),
        ("gpt_neox", {"scheme": "pre", **BIASED, "head_dim": 16}, "^gpt_neox cannot express model.head_dim=16$"),
        ("bert", {"scheme": "pre"}, f"architecture=bert is not supported; {SUPPORTED}"),
    ],
)
def test_what_an_architecture_does_not_express_is_not_saved_as_it(
    refuses_to_save, small_config, random_params, architecture, keys, match
):
    config = small_config(**keys)
    refuses_to_save(match, config, random_params(config), architecture=architecture)


@pytest.mark.parametrize(
    ("keys", "architecture"),
    [
        ({"scheme": "pre"}, "llama"),
        ({"scheme": "pre_qk_pre"}, "qwen3"),
        ({"scheme": "reordered"}, "olmo2"),
        ({"scheme": "hybrid_star"}, "hybridnorm"),
        ({"scheme": "pre", "norm": "crmsnorm"}, "hybridnorm"),
        ({"scheme": "reordered", "mlp_bias": True}, "hybridnorm"),
    ],
)
def test_an_architecture_of_transformers_is_written_where_one_expresses_the_model(
    tmp_path, small_config, random_params, keys, architecture
):
    config = small_config(**keys)
    save_huggingface(tmp_path / "out", config, random_params(config))
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["model_type"] == architecture
    assert ("auto_map" in document) == (architecture == "hybridnorm")
    assert (tmp_path / "out" / "modeling_hybridnorm.py").exists() == (architecture == "hybridnorm")


def _without(tree, *path):
    return {
        key: _without(value, *path[1:]) if len(path) > 1 and key == path[0] else value
        for key, value in tree.items()
        if path != (key,)
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: _without(p, "run_0", "attention", "key"), "run_0/attention/key/kernel: not among the parameters"),
        (lambda p: p | {"extra": np.ones(3)}, "extra: among the parameters, but a model of this config does not have"),
        (lambda p: p | {"final_norm": {"scale": np.ones(31, np.float32)}}, r"final_norm/scale: shape \(31,\), but"),
        (
            lambda p: p | {"final_norm": {"scale": np.ones(32, np.int32)}},
            "final_norm/scale: dtype int32, but model.par",
        ),
        (
            lambda p: p | {"final_norm": {"scale": np.full(32, np.nan, np.float32)}},
            "final_norm/scale: holds NaN or Inf",
        ),
        (lambda p: list(p), "params: must be the parameter tree of the model, not list"),
    ],
)
def test_parameters_that_are_not_the_models_are_not_saved(refuses_to_save, change, match):
    config, params = load_huggingface(GOLDENS / "hf_llama")
    refuses_to_save(match, config, change(params))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"extra": {"hidden_size": 64}}, "extra: hidden_size=64, but the model has hidden_size=32"),
        ({"extra": {"wings": 2}}, "extra: wings=2 is not known for llama"),
        ({"extra": {"sliding_window": 2}}, "extra: sliding_window=2 is not implemented for llama"),
        (
            {"extra": {"rope_parameters": {"rope_theta": 3.0}}},
            "extra: rope_theta=10000.0, but elsewhere in the file it is 3.0",
        ),
        ({"extra": {"bos_token_id": object()}}, "extra: cannot be written as JSON"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0: must be at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(refuses_to_save, keys, match):
    refuses_to_save(match, *load_huggingface(GOLDENS / "hf_llama"), **keys)


def test_a_directory_that_holds_something_is_not_written_to(tmp_path, refuses_to_save):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    (tmp_path / "deep" / "out" / "notes").write_text("mine")
    refuses_to_save("out: exists already; name a new directory", *load_huggingface(GOLDENS / "hf_llama"))
    shutil.rmtree(tmp_path / "deep" / "out")
    (tmp_path / "deep" / "out").write_text("a file")
    refuses_to_save("out: exists already; name a new directory", *load_huggingface(GOLDENS / "hf_llama"))


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def full_disk(file, *arguments):
        if written:
            raise OSError(28, "No space left on device")
        write_shard(file, *arguments)
        written.append(file)

    write_shard = safetensors_files._write_shard
    monkeypatch.setattr(safetensors_files, "_write_shard", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_huggingface(tmp_path / "new" / "out", *load_huggingface(GOLDENS / "hf_llama"), max_shard_bytes=50_000)
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_a_leaf_of_the_model_is_found_out(small_config):
    with pytest.raises(hn.UserError, match=r"run_0/attention/.*_norm/scale: this architecture has no tensor for"):
        list(ALL["llama"].tensors.places(small_config(scheme="pre_qk_pre")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}"}, "files: config.json: must be the plain name"),
        ({"model.safetensors": b""}, "files: model.safetensors: must be the plain name"),
        ({"model-00001-of-00002.safetensors": b""}, "files: model-00001-of-00002.safetensors: must be the plain name"),
        ({"model.safetensors.index.json": b"{}"}, "files: model.safetensors.index.json: must be the plain name"),
        ({"modeling_hybridnorm.py": b""}, "files: modeling_hybridnorm.py: must be the plain name"),
        ({"../notes": b""}, r"files: \.\./notes: must be the plain name"),
        ({"a/notes": b""}, "files: a/notes: must be the plain name"),
        ({"": b""}, "files: : must be the plain name"),
        ({"notes": "text"}, "files: notes: must be bytes, not str"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)) or "empty",
)
def test_further_files_are_none_of_the_models_own(tmp_path, small_config, random_params, files, message):
    """One named config.json once took the place of the model's own, and one outside was lost without a word."""
    config = small_config(scheme="span")
    with pytest.raises(hn.UserError, match=message):
        hn.save_huggingface(tmp_path / "out", config, random_params(config), files=files)
    assert not any(tmp_path.iterdir())
