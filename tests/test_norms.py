"""The three norms against their definitions in NumPy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

RNG = np.random.default_rng(0)
EPS = 1e-3


def _layer_norm(x, eps=EPS):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def _rms_norm(x, eps=EPS):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize(("norm", "reference"), [(hn.layer_norm, _layer_norm), (hn.rms_norm, _rms_norm)])
def test_definition_in_float64_with_scale_and_bias(norm, reference):
    x, scale, bias = RNG.normal(2, 3, (4, 7)), RNG.normal(size=7), RNG.normal(size=7)
    with jax.enable_x64(True):
        ours = norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), eps=EPS)
        assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, reference(x) * scale + bias, rtol=1e-13)


def test_crms_norm_is_rms_norm_of_the_whole_vector_without_its_last_element():
    whole = RNG.normal(size=(5, 9))
    whole -= whole.mean(-1, keepdims=True)
    with jax.enable_x64(True):
        ours = hn.crms_norm(jnp.asarray(whole[:, :-1]), eps=EPS)
        padded = hn.crms_norm(jnp.asarray(np.pad(whole[:, :-1], ((0, 0), (0, 3)))), eps=EPS, width=9)
    np.testing.assert_allclose(ours, _rms_norm(whole)[:, :-1], rtol=1e-13)
    np.testing.assert_allclose(padded[:, :8], ours, rtol=1e-13)
    assert not padded[:, 8:].any()


def test_layer_norm_is_rms_norm_of_the_centred_vector():
    x = RNG.normal(5, 2, (3, 16))
    with jax.enable_x64(True):
        ours = hn.layer_norm(jnp.asarray(x), eps=EPS)
        centred = hn.rms_norm(jnp.asarray(x - x.mean(-1, keepdims=True)), eps=EPS)
    np.testing.assert_allclose(ours, centred, rtol=1e-12)


def test_layer_norm_survives_a_mean_of_a_million_deviations():
    # Numbers that float32 holds exactly, so that all error is the norm's: mean 2^20, deviations of order 1.
    x = np.float32(2**20) + RNG.integers(-16, 17, (4, 256)).astype(np.float32) / 8
    reference = _layer_norm(x.astype(np.float64), 1e-5)
    np.testing.assert_allclose(hn.layer_norm(jnp.asarray(x)), reference, atol=3e-6)


@pytest.mark.parametrize("norm", [hn.layer_norm, hn.rms_norm, hn.crms_norm])
def test_bfloat16_keeps_float32_statistics(norm):
    # A running bfloat16 sum of 4096 squares would stop growing long before its end.
    x = jnp.asarray(RNG.normal(size=(2, 4096)), jnp.bfloat16)
    ours, wide = norm(x), norm(x.astype(jnp.float32))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), wide, rtol=2**-8)  # one rounding to 8 bits


@pytest.mark.parametrize("norm", [hn.layer_norm, hn.rms_norm, hn.crms_norm])
def test_eps_stands_inside_the_root(norm):
    tiny = jnp.asarray([[1e-4, -1e-4, 1e-4, -1e-4]])
    expected = tiny / np.sqrt((1e-8 * 4 / (5 if norm is hn.crms_norm else 4)) + 1e-3)
    np.testing.assert_allclose(norm(tiny, eps=1e-3), expected, rtol=1e-6)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int32"):
        hn.rms_norm(jnp.arange(4))


def test_the_module_holds_the_parameters_and_calls_the_function():
    x = jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    module = hn.Norm(kind="layernorm", eps=EPS, use_bias=True, scale_init=0.5)
    params = module.init(jax.random.key(0), x)["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {"scale": (8,), "bias": (8,)}
    np.testing.assert_allclose(params["scale"], 0.5)
    params = {"scale": jnp.arange(8.0), "bias": jnp.ones(8)}
    expected = hn.layer_norm(x, params["scale"], params["bias"], eps=EPS)
    np.testing.assert_array_equal(module.apply({"params": params}, x), expected)
    assert not hn.Norm(use_scale=False).init(jax.random.key(0), x)


def test_a_wrong_kind_or_width_is_refused():
    with pytest.raises(ValueError, match="batchnorm"):
        hn.Norm(kind="batchnorm").init(jax.random.key(0), jnp.ones(3))
    with pytest.raises(ValueError, match="width=9"):
        hn.Norm(kind="rmsnorm", width=9).init(jax.random.key(0), jnp.ones(3))
