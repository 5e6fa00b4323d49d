"""The shapes of a model's parameters, asked without any model."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.model import abstract_params as abstract_module
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.schemes import SCHEMES


def test_they_are_those_of_the_decoder(small_config):
    for keys in ({"scheme": "hybrid_star"}, {"scheme": "span", "tie_embeddings": True}, {"param_dtype": "bfloat16"}):
        config = small_config(**keys)
        params = jax.eval_shape(hn.Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config)) == expected


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_what_is_remembered_is_of_this_scheme_and_this_precision(small_config, monkeypatch):
    config = small_config(scheme="pre")
    before = abstract_params(config)
    before["run_0"]["attention"].clear()  # a caller's own copy
    assert abstract_params(config)["run_0"]["attention"]
    monkeypatch.setitem(SCHEMES, "pre", hn.Scheme("pre", SCHEMES["peri"].block, final_norm=True))
    assert "attention_branch_norm" in abstract_params(config)["run_0"]
    double = small_config(scheme="post", param_dtype="float64")
    with jax.enable_x64(True):
        assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(double))} == {jnp.dtype("float64")}
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(double))} == {jnp.dtype("float32")}


def test_they_are_found_inside_a_sharded_step(small_config):
    """The equivalent forms ask for them while a training step of a mesh is traced."""
    config = small_config(scheme="pre")
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    def step(x):
        with nn.logical_axis_rules((("vocab", "fsdp"),)):
            assert jax.tree.structure(abstract_params(config)) == jax.tree.structure(expected)
        return x

    expected = abstract_params(config)
    abstract_module._traced.cache_clear()
    with jax.set_mesh(mesh):
        step(jnp.zeros(8))
    abstract_module._traced.cache_clear()
    with nn.logical_axis_rules((("vocab", "fsdp"),)):
        assert jax.tree.structure(abstract_params(config)) == jax.tree.structure(expected)


def test_no_device_is_started():
    """Reading a checkpoint on a machine whose accelerators are busy must not take one."""
    code = """
import hybridnorm_jax as hn
from hybridnorm_jax.model.abstract_params import abstract_params
abstract_params(hn.ModelConfig(d_model=32, num_layers=1, num_heads=2))
from jax._src import xla_bridge
print(len(xla_bridge._backends))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
