"""What a caller of the library gets wrong is named, and not passed over."""

import dataclasses
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.hooks.hook import Hook

X = jnp.ones((2, 4, 32))
MODEL = hn.ModelConfig(d_model=8, num_layers=1, num_heads=2, mlp_dim=8, vocab_size=11)


def test_a_misspelt_norm_of_attention_is_no_other_norm():
    with pytest.raises(ValueError, match="q_norm='heads': must be None, 'head' or 'projection'"):
        hn.Attention(num_heads=4, q_norm="heads").init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (hn.Attention(num_heads=4), X[0], r"x: shape \(4, 32\) must be \(batch, seq, embed\)"),
        (hn.Attention(num_heads=4), X[:, :0], r"x: shape \(2, 0, 32\) must be .* seq at least 1"),
        (
            hn.MoE(num_experts=2, experts_per_token=1, mlp_dim=8, dispatch="foo"),
            X,
            "dispatch='foo': must be auto, dense",
        ),
        (hn.MoE(num_experts=2, experts_per_token=1, mlp_dim=0), X, "mlp_dim=0: must be at least 1"),
        (hn.FeedForward(mlp_dim=0), X, "mlp_dim=0: must be at least 1"),
        (hn.Block(MODEL, MODEL.placements[0], layer=1), X[..., :8], r"layer=1: must be in \[0, num_layers=1\)"),
        (hn.Decoder(MODEL), jnp.zeros(4, jnp.int32), r"tokens: shape \(4,\) must be \(batch, seq\)"),
        (hn.Norm(dtype=jnp.int32), X, "dtype=int32: must be a floating-point dtype"),
        (hn.Norm(reduction_axes=(0, 9)), X, r"reduction_axes=\(0, 9\): x has 3 axes, from -3 to 2"),
        (hn.Norm(), jnp.float32(1), "feature_axes=-1: x is a scalar"),
        (hn.Norm(kind="crmsnorm", width=34), X, r"width=34: x has 32 channels, so it must be in \[1, 33\]"),
        (hn.Norm(kind="crmsnorm", width=0), X, "width=0: x has 32 channels"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_sizes_and_shapes_that_cannot_be_are_named(module, x, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), x)


def test_a_mask_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mask: hn\.Norm has mask=None only"):
        hn.Norm().init(jax.random.key(0), X, mask=X > 0)


def test_axes_of_norm_are_integers_of_any_kind_in_any_order():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    variables = nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)).init(jax.random.key(0), x)
    expected = nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2), use_fast_variance=False).apply(variables, x)
    for axes in ((2, 1), [-1, -2], (np.int64(1), 2), np.array([1, 2]), (1, -1, 2)):
        ours = hn.Norm(kind="layernorm", reduction_axes=axes, feature_axes=axes)
        np.testing.assert_allclose(ours.apply(variables, x), expected, atol=1e-6)
    assert hn.Norm(kind="crmsnorm", reduction_axes=2).init(jax.random.key(0), x)
    for axes in ((), [-1], np.int32(0)):
        hn.nnx.Norm(4, reduction_axes=axes, rngs=nnx.Rngs(0))(x)


def test_parameters_for_an_nnx_module_are_what_is_inside_and_arrays():
    norm = hn.nnx.Norm(4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"params: gives \{.params.: \.\.\.\}; give what is inside"):
        hn.nnx.from_linen_params(norm, {"params": hn.nnx.to_linen_params(norm)})
    with pytest.raises(UserError, match=r"scale: is float64\[\], but the module's is float32\[4\]"):
        hn.nnx.from_linen_params(norm, {"scale": 2.0})
    hn.nnx.from_linen_params(norm, {"scale": np.full(4, 2, np.float32)})
    assert isinstance(norm.scale.get_value(), jax.Array)


@pytest.mark.parametrize(
    "module",
    [hn.Attention(num_heads=4), hn.FeedForward(8), hn.MoE(2, 1, 8), hn.Block(MODEL, MODEL.placements[0]), hn.Norm()],
    ids=lambda module: type(module).__name__,
)
def test_modules_are_pickled(module):
    again = pickle.loads(pickle.dumps(module))
    variables, expected = (each.init(jax.random.key(0), X[..., :8]) for each in (again, module))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_one_collection_may_be_named_by_a_string():
    moe = hn.nnx.MoE(32, num_experts=4, experts_per_token=2, mlp_dim=8, rngs=nnx.Rngs(0))
    _, sown = moe(X, mutable="router")
    assert "statistics" in sown["router"]


def test_an_axis_that_no_mesh_has_is_named():
    with pytest.raises(ConfigError, match=r"mesh=dat: not known; did you mean 'data'"):
        hn.make_mesh({"fsdp": jax.device_count(), "dat": 2})


def _params():
    return jax.jit(hn.Decoder(MODEL).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (lambda params: {"params": params}, 0, "params: .* is nothing, but the model has float32"),
        (lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), 0, "is bfloat16.*has float32"),
        (lambda params: params, -1, "step=-1: must not be negative"),
    ],
    ids=["variables", "dtype", "step"],
)
def test_a_run_that_could_not_be_loaded_is_not_saved(change, step, message, tmp_path):
    config = dataclasses.replace(hn.RunConfig(), model=MODEL)
    with pytest.raises(UserError, match=message):
        hn.save_run(str(tmp_path / "run"), config, change(_params()), step=step)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config", [None, {"d_model": 8}, (MODEL, {}), hn.RunConfig(), "gpt2", hn.ModelConfig], ids=repr
)
@pytest.mark.parametrize(
    "call",
    [
        hn.build_model,
        lambda config: hn.equivalence.to_pre_crmsnorm(config, {}),
        lambda config: hn.save_huggingface("/nowhere/at/all", config, {}),
    ],
    ids=["build_model", "to_pre_crmsnorm", "save_huggingface"],
)
def test_what_is_no_models_configuration_is_called_so(call, config):
    """build_model once made a Decoder of anything, which failed when it was used, far from the mistake."""
    with pytest.raises(ConfigError, match=f"config: is of the type {type(config).__name__}; give a ModelConfig or an"):
        call(config)


def test_the_home_directory_is_the_same_for_saving_and_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hn.save_run("~/run", dataclasses.replace(hn.RunConfig(), model=MODEL), _params())
    assert (tmp_path / "run/config.yaml").exists()
    hn.load_run("~/run")


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*b", "what?"])
def test_a_place_that_orbax_would_read_as_a_pattern_is_refused_before_anything_is_written(name, tmp_path):
    config = dataclasses.replace(hn.RunConfig(), model=MODEL)
    message = r"checkpoints cannot be in a path with [\[*?] in it; choose another"
    with pytest.raises(UserError, match=message):
        hn.save_run(str(tmp_path / name / "run"), config, _params())
    run = dataclasses.replace(config.run, name=name, dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(config, run=run))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_saved_through_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: is a symbolic link; name the directory that is meant"):
        hn.save_run(str(tmp_path / "link"), dataclasses.replace(hn.RunConfig(), model=MODEL), _params())


def test_a_run_is_saved_with_its_whole_configuration(tmp_path):
    with pytest.raises(UserError, match=r"config: is a ModelConfig; give hn\.RunConfig\(model=\.\.\.\)"):
        hn.save_run(str(tmp_path / "run"), MODEL, _params())


class _Never(Hook):
    every = 0


@pytest.mark.parametrize(
    ("hook", "message"),
    [(_Never(), r"_Never\.every=0: must be at least 1"), (_Never, "no object of a subclass of Hook")],
    ids=["every", "class"],
)
def test_what_is_no_hook_is_named_before_anything_is_read(hook, message):
    with pytest.raises(UserError, match=message):
        loop.train(hn.RunConfig(), hooks=[hook])
