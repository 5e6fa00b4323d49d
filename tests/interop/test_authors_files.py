"""Checkpoints of authors as files and as torch has them, and what does not fit, which is refused in one line."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from authors_models import case, part
from safetensors.numpy import save_file

import hybridnorm_jax as hn


def _tree_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _arrays(name):
    project, config, golden = case(name)
    return project, config, part(golden, "param/")


def refusal(project, config, arrays, **keys):
    """The one line that says why these arrays are not read."""
    with pytest.raises(hn.UserError) as raised:
        hn.params_from_authors(project, config, arrays, **keys)
    message = str(raised.value)
    assert message.isprintable()
    return message


# ---- Projects


def test_a_project_knows_what_its_models_have():
    config = hn.PROJECTS["fairseq"].config(scheme="normformer", d_model=64, num_heads=4, max_positions=512)
    assert (config.norm, config.position_offset, config.embedding_scale) == ("layernorm", 2, 8.0)
    assert hn.PROJECTS["fairseq"].config(embedding_scale=None, max_positions=512).embedding_scale is None
    assert hn.PROJECTS["b2t"].config(activation="gelu", max_positions=512).activation == "gelu"
    with pytest.raises(hn.ConfigError, match=r"^model\.max_positions=null"):
        hn.PROJECTS["fairseq"].config(scheme="normformer")


@pytest.mark.parametrize(
    "prefix", ["", "decoder.", "module.decoder.", "module._orig_mod.decoder.", "_orig_mod.module."]
)
def test_prefixes_of_all_names_are_taken_off(prefix):
    project, config, arrays = _arrays("torchscale_subln")
    named = {prefix + name: array for name, array in arrays.items()}
    _tree_equal(hn.params_from_authors(project, config, named), hn.params_from_authors(project, config, arrays))


def test_the_prefixes_are_those_of_torchs_wrappers():
    torch = pytest.importorskip("torch")
    model = torch.nn.Module()
    model.decoder = torch.nn.Linear(2, 2)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model))):
        names = list(wrapped.state_dict())
        assert names != ["decoder.weight", "decoder.bias"]
        assert hn.PROJECTS["fairseq"].own_names(names) == ["weight", "bias"]


def test_what_fairseq_stores_beside_parameters_is_left_out():
    project, config, arrays = _arrays("normformer")
    named = {f"decoder.{name}": array for name, array in arrays.items()} | {"decoder.version": np.full(1, 3.0)}
    _tree_equal(hn.params_from_authors(project, config, named), hn.params_from_authors(project, config, arrays))


def test_tensors_of_torch_are_read():
    torch = pytest.importorskip("torch")
    project, config, arrays = _arrays("dyt_llama")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    _tree_equal(hn.params_from_authors(project, config, tensors), hn.params_from_authors(project, config, arrays))
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert refusal(project, config, halves).startswith("shared.emb.weight: cannot be read from the checkpoint: ")
    graph = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    assert "detach()" in refusal(project, config, graph)


# ---- Dtypes


def test_arrays_of_bfloat16_stay_so_or_become_what_is_asked():
    project, config, arrays = _arrays("mix_ln")
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    params = hn.params_from_authors(project, config, halves)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    wide = hn.params_from_authors(project, config, halves, dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    _tree_equal(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def test_several_dtypes_need_a_word():
    project, config, arrays = _arrays("mix_ln")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float64)
    wrong = "dtype float64 in the checkpoint, but others are float32"
    assert refusal(project, config, arrays) == f"model.norm.weight: {wrong}; pass dtype=, such as dtype='float32'"
    params = hn.params_from_authors(project, config, arrays, dtype="float32")
    np.testing.assert_array_equal(params["final_norm"]["scale"], arrays["model.norm.weight"].astype(np.float32))
    assert refusal(project, config, arrays, dtype="int8").startswith("dtype=int8: not known; known: bfloat16, ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda array: array.astype(np.int32), "dtype int32 in the checkpoint, but parameters are floats"),
        (lambda array: array.astype(bool), "dtype bool in the checkpoint, but parameters are floats"),
        (lambda array: array.astype(object), "dtype object in the checkpoint, but parameters are floats"),
        (lambda array: array.astype(np.complex64), "dtype complex64 in the checkpoint, but parameters are floats"),
        (lambda array: array.astype(np.longdouble), r"dtype \w+ in the checkpoint must be one of float32, float64"),
        (lambda array: array.astype(ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn in the checkpoint must be one of"),
        (lambda array: array[:, :-1], r"shape \(61, 31\) in the checkpoint, \(61, 32\) by the configuration"),
        (lambda array: array.T, r"shape \(32, 61\) in the checkpoint, \(61, 32\) by the configuration"),
        (lambda array: None, r"shape \(\) in the checkpoint, \(61, 32\) by the configuration"),
        (lambda array: np.where(array > 1, np.nan, array), "holds NaN or Inf, read as float32"),
        (lambda array: np.where(array > 1, -np.inf, array), "holds NaN or Inf, read as float32"),
    ],
    ids=[
        *("int32", "bool", "object", "complex64", "longdouble", "float8", "narrow", "transposed", "none", "nan", "inf"),
    ],
)
def test_an_array_that_is_no_such_parameter_is_refused(changed, message):
    project, config, arrays = _arrays("layernorm_scaling")
    name = "model.embed_tokens.weight"
    arrays[name] = changed(arrays[name])
    assert re.match(f"{re.escape(name)}: {message}", refusal(project, config, arrays))


def test_a_number_too_large_for_the_dtype_is_refused():
    project, config, arrays = _arrays("layernorm_scaling")
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 1e6
    message = refusal(project, config, arrays, dtype="float16")
    assert message == "model.norm.weight: holds NaN or Inf, read as float16"


# ---- Names


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("torchscale_subln", "pre", "layers.0.self_attn.inner_attn_ln.weight: in the checkpoint, but a model of"),
        ("torchscale_post", "pre", "layer_norm.weight: not in the checkpoint, but the configuration asks for it"),
        ("normformer_resid", "normformer", "layers.0.w_resid: in the checkpoint, but a model of"),
        ("siamese_attn_norm", "pre", "run_0/attention_pre_norm/scale: this architecture has no tensor for"),
        ("mix_ln", "pre", "model.layers.0.input_layernorm.weight: not in the checkpoint, but"),
        ("mix_ln", "post_final_norm", "model.layers.1.post_feedforward_layernorm.weight: not in the checkpoint, but"),
        ("mix_ln_repo_pre", "sandwich", "model.layers.0.pre_feedforward_layernorm.weight: not in the checkpoint, but"),
        ("mix_ln_repo_sandwich", "pre", "model.layers.0.pre_feedforward_layernorm.weight: in the checkpoint, but"),
        ("mix_ln_repo_post", "post", "model.norm.weight: in the checkpoint, but a model of"),
        ("deepnorm_llama", "pre_qk_projection", "model.layers.0.input_layernorm.weight: not in the checkpoint, but"),
        ("layernorm_scaling", "pre_qk_projection", "run_0/attention/k_norm/scale: this architecture has no tensor for"),
    ],
)
def test_a_checkpoint_of_another_scheme_is_refused_by_name(name, scheme, message):
    project, config, golden = case(name, scheme=scheme)
    assert refusal(project, config, part(golden, "param/")).startswith(message)


def test_what_is_missing_or_left_over_is_named():
    project, config, arrays = _arrays("dyt_llama")
    without = {name: array for name, array in arrays.items() if name != "dec_norm.alpha"}
    message = "dec_norm.alpha: not in the checkpoint, but the configuration asks for it"
    assert refusal(project, config, without) == message
    right = "in the checkpoint, but a model of this configuration has no place for it"
    assert refusal(project, config, arrays | {"more": np.ones(1)}) == f"more: {right}"
    assert refusal(project, config, arrays | {"shared_scale": np.ones(2)}).startswith("shared_scale: shape (2,)")
    assert refusal("fairsec", config, arrays) == "project=fairsec: not known; did you mean 'fairseq'?"
    for project in (3, ["fairseq"], None):
        assert refusal(project, config, arrays).startswith(f"project={project}: not known; ")


def test_prefixes_that_are_not_known_or_not_of_all_names_are_named():
    project, config, arrays = _arrays("torchscale_subln")
    message = (
        "embed_tokens.weight: not in the checkpoint, but the configuration asks for it; {} is there, with a prefix"
    )
    for prefix in ("encoder.", "model.decoder."):
        named = {prefix + name: array for name, array in arrays.items()}
        assert refusal(project, config, named).startswith(message.format(f"{prefix}embed_tokens.weight"))
    both = {f"decoder.{name}": array for name, array in arrays.items()} | {"encoder.embed_tokens.weight": np.ones(2)}
    assert refusal(project, config, both).startswith(message.format("decoder.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "arrays: must map names to arrays, not list"),
        ({}, "tok_embeddings.weight: not in the checkpoint, but the configuration asks for it"),
        ({1: np.ones(2)}, "arrays: must map names to arrays, but 1 is no text"),
        (
            {"args": None, "model": {"a": np.ones(2)}},
            "model: a mapping, not an array; pass the mapping that holds the parameters, such as arrays['model']",
        ),
    ],
    ids=["list", "empty", "numbers", "nested"],
)
def test_what_is_no_checkpoint_is_refused(arrays, message):
    project, config, _ = case("simplegpt")
    assert refusal(project, config, arrays) == message


@pytest.mark.parametrize("config", [None, {"d_model": 32}])
def test_what_is_no_config_is_refused(config):
    assert refusal("simplegpt", config, {}).startswith("config: is of the type ")


# ---- Tied heads


def test_a_tied_models_own_copy_of_the_head_must_be_the_embedding():
    project, config, arrays = _arrays("derf_nanogpt")
    assert config.tie_embeddings
    table = arrays["transformer.wte.weight"]
    read = hn.params_from_authors(project, config, arrays | {"lm_head.weight": table.copy()})
    _tree_equal(read, hn.params_from_authors(project, config, arrays))
    message = refusal(project, config, arrays | {"lm_head.weight": table + 1e-3})
    right = "is not transformer.wte.weight, but the configuration has tie_embeddings=True"
    assert message == f"lm_head.weight: {right}"
    assert refusal(project, config, arrays | {"lm_head.weight": table[1:]}).startswith("lm_head.weight: shape (60, 32)")


def test_a_head_that_is_missing_may_be_tied():
    project, config, arrays = _arrays("normformer")
    del arrays["output_projection.weight"]
    message = refusal(project, config, arrays)
    assert message.endswith("the configuration asks for it; a head that is the embedding is model.tie_embeddings=true")
    tied = case("normformer", tie_embeddings=True)[1]
    assert "head" not in hn.params_from_authors(project, tied, arrays)


# ---- Files


def test_a_file_and_a_directory_are_read(tmp_path):
    project, config, arrays = _arrays("mix_ln")
    expected = hn.params_from_authors(project, config, arrays)
    file = tmp_path / "checkpoint.safetensors"
    save_file(arrays, file)
    found, params = hn.load_authors(project, file, config)
    assert found == config
    _tree_equal(params, expected)
    (tmp_path / "link").symlink_to(file)
    _tree_equal(hn.load_authors(project, tmp_path / "link", config)[1], expected)

    directory = tmp_path / "shards"
    directory.mkdir()
    shards = {"a.safetensors": list(arrays)[::2], "b.safetensors": list(arrays)[1::2]}
    for name, names in shards.items():
        save_file({each: arrays[each].astype(np.float16) for each in names}, directory / name)
    places = {each: name for name, names in shards.items() for each in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found, params = hn.load_authors(project, directory, config)
    assert found.param_dtype == "float16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float16"}
    found, params = hn.load_authors(project, directory, config, dtype="float32")
    assert found == config
    np.testing.assert_allclose(params["head"]["kernel"], expected["head"]["kernel"], rtol=1e-3, atol=1e-6)


def test_a_file_of_bfloat16_is_read(tmp_path):
    project, config, arrays = _arrays("normformer")
    file = tmp_path / "checkpoint.safetensors"
    save_file({f"decoder.{name}": array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}, file)
    found, params = hn.load_authors(project, file, config)
    assert found.param_dtype == "bfloat16"
    logits = jax.jit(hn.Decoder(found).apply)({"params": params}, case("normformer")[2]["tokens"])
    assert np.isfinite(logits).all()


def test_a_file_that_does_not_fit_is_named(tmp_path):
    project, config, arrays = _arrays("mix_ln")
    file = tmp_path / "checkpoint.safetensors"

    def refused(path=file):
        with pytest.raises(hn.UserError) as raised:
            hn.load_authors(project, path, config)
        assert str(raised.value).isprintable()
        return str(raised.value)

    assert refused() == f"{file}: no such file"
    assert refused("") == "path='': must be the path of safetensors files"
    assert refused(None) == "path=None: must be the path of safetensors files"
    pickle = tmp_path / "checkpoint_best.pt"
    pickle.write_bytes(b"anything")
    assert refused(pickle).startswith(f"{pickle}: a pickle, which can run any code and is never read")
    assert refused(tmp_path).startswith(f"{pickle}: a pickle, which can run any code and is never read")
    file.write_bytes(b"anything else")
    assert refused().startswith(f"{file}: damaged or cut off: ")
    save_file({name: array for name, array in arrays.items() if name != "model.norm.weight"}, file)
    assert refused() == f"model.norm.weight: not in {file}, but the configuration asks for it"
    save_file(arrays | {"model.norm.weight": np.ones(32, np.int64)}, file)
    assert refused() == f"model.norm.weight: dtype int64 in {file}, but parameters are floats"
