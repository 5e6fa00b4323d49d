"""What a caller of the library gets wrong is named, and not passed over."""

import dataclasses

import jax
import jax.numpy as jnp
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


def test_one_collection_may_be_named_by_a_string():
    moe = hn.nnx.MoE(32, num_experts=4, experts_per_token=2, mlp_dim=8, rngs=nnx.Rngs(0))
    _, sown = moe(X, mutable="router")
    assert "statistics" in sown["router"]


def test_an_axis_that_no_mesh_has_is_named():
    with pytest.raises(ConfigError, match=r"mesh=dat: not known; did you mean 'data'"):
        hn.make_mesh({"fsdp": jax.device_count(), "dat": 2})


def _params():
    return hn.Decoder(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


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


def test_the_home_directory_is_the_same_for_saving_and_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hn.save_run("~/run", dataclasses.replace(hn.RunConfig(), model=MODEL), _params())
    assert (tmp_path / "run/config.yaml").exists()
    hn.load_run("~/run")


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
