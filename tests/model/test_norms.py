"""The three norms against their definitions in NumPy, float64."""

import dataclasses
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

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
    module = hn.Norm(kind="layernorm", epsilon=EPS, scale_init=nn.initializers.constant(0.5))
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


def _exact_layer_norm(x, eps):
    """Deviations from the exact mean: one of a million deviations in long double is off by 1e-12 of a deviation."""
    rows = [[Fraction(float(number)) for number in row] for row in x]
    means = [sum(row) / len(row) for row in rows]
    centred = [[float(number - mean) for number in row] for row, mean in zip(rows, means, strict=True)]
    return _layer_norm(np.array(centred, np.longdouble), eps)


def _crms_norm(x, eps):
    whole = np.concatenate([x, -x.sum(-1, keepdims=True)], -1)
    return _rms_norm(whole, eps)[..., :-1]


# A few widths, so that only a few programs compile.
vectors = {
    "width": st.sampled_from([2, 3, 17, 64, 255]),
    "eps": st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0]),
    "deviation": st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
    "offset": st.sampled_from([-1e6, -1.0, 0.0, 1e-3, 30.0, 1e6]),
    "seed": st.integers(0, 2**32 - 1),
}


def _vector(width, deviation, offset, seed):
    """`offset` counts in deviations."""
    rng = np.random.default_rng(seed)
    return deviation * (offset + rng.standard_normal((3, width)))


@pytest.mark.parametrize(
    ("norm", "reference"), [(hn.layer_norm, _exact_layer_norm), (hn.rms_norm, _rms_norm), (hn.crms_norm, _crms_norm)]
)
@settings(max_examples=60, deadline=None)
@example(width=3, eps=0.0, deviation=1e3, offset=-1e6, seed=100)
@given(**vectors)
def test_any_vector_in_float64(norm, reference, width, eps, deviation, offset, seed):
    x = _vector(width, deviation, offset, seed)
    assume(x.std(-1).min() > 0.01 * deviation)  # two draws can be almost equal
    scale, bias = np.random.default_rng(seed + 1).standard_normal((2, width))
    expected = reference(x.astype(np.longdouble), eps) * scale + bias
    with jax.enable_x64(True):
        ours = jax.jit(norm)(x, scale, bias, eps=eps)
    # One float64 rounding of numbers up to 16 deviations, times a scale of a few.
    np.testing.assert_allclose(np.asarray(ours), expected.astype(np.float64), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(**vectors)
def test_the_three_norms_are_one_on_centred_vectors(width, eps, deviation, offset, seed):
    """LayerNorm(x) = RMSNorm(x - mean) = (CRMSNorm(its first elements), and the last from them)."""
    x = _vector(width, deviation, offset, seed)
    assume(x.std(-1).min() > 0.01 * deviation)
    with jax.enable_x64(True):
        centred = x - x.mean(-1, keepdims=True)
        centred = jnp.asarray(centred - centred.mean(-1, keepdims=True))
        layer, rms = hn.layer_norm(jnp.asarray(x), eps=eps), hn.rms_norm(centred, eps=eps)
        stored = hn.crms_norm(centred[..., :-1], eps=eps)
    np.testing.assert_allclose(layer, rms, atol=1e-13)
    np.testing.assert_allclose(stored, rms[..., :-1], atol=1e-13)
    np.testing.assert_allclose(-np.asarray(stored).sum(-1), rms[..., -1], atol=1e-13 * width)


@settings(max_examples=60, deadline=None)
@given(**vectors)
def test_layer_norm_in_float32_of_any_offset(width, eps, deviation, offset, seed):
    """Against float64 on the same float32 numbers, a mean of a million deviations included."""
    x = _vector(width, deviation, offset, seed).astype(np.float32)
    expected = _layer_norm(x.astype(np.float64), eps)
    assume(x.std(-1, dtype=np.float64).min() > 0.01 * deviation)
    ours = np.asarray(jax.jit(hn.layer_norm)(jnp.asarray(x), eps=eps))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# ---- Norm in the place of flax.linen's

ARGUMENTS = [
    {},
    {"epsilon": 1e-3},
    {"use_scale": False},
    {"param_dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float32, "scale_init": nn.initializers.normal(0.3)},
    {"reduction_axes": (1, 2)},
    {"reduction_axes": (-2, -1), "feature_axes": (1, 2)},
]
KINDS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "-".join(arguments) or "defaults")
@pytest.mark.parametrize("kind", KINDS)
def test_norm_and_flaxs_norms_read_each_others_parameters(kind, arguments, dtype):
    x = jnp.asarray(2 + RNG.standard_normal((3, 5, 16)), dtype)
    ours, theirs = hn.Norm(kind=kind, **arguments), KINDS[kind](**arguments)
    for one, other in ((ours, theirs), (theirs, ours)):
        variables = one.init(jax.random.key(3), x)
        again = other.init(jax.random.key(3), x)
        assert jax.tree.structure(variables) == jax.tree.structure(again)
        jax.tree.map(np.testing.assert_array_equal, variables, again)
        y, expected = one.apply(variables, x), other.apply(variables, x)
        assert y.dtype == expected.dtype
        # float32 statistics: Flax's variance E[x^2] - E[x]^2 loses (mean^2 + var) / var = 5 units of 2^-24 and its sums
        # a few more; 64 units are a bound with room. A bfloat16 result may then round to the neighbour, 2^-7 away.
        unit = 2**-7 if y.dtype == jnp.bfloat16 else 64 * 2**-24
        y, expected = (np.asarray(array, np.float64) for array in (y, expected))
        np.testing.assert_allclose(y, expected, rtol=unit, atol=unit * np.abs(expected).max())


def test_norms_defaults_are_flaxs():
    for kind, theirs in KINDS.items():
        ours, flax = hn.Norm(kind=kind), theirs()
        x = jnp.ones((2, 4))
        assert ours.epsilon == flax.epsilon == 1e-6
        assert set(ours.init(jax.random.key(0), x)["params"]) == set(flax.init(jax.random.key(0), x)["params"])
        names = {field.name for field in dataclasses.fields(flax)}
        assert names <= {field.name for field in dataclasses.fields(ours)}


def test_statistics_are_exact_where_flaxs_fast_variance_is_not():
    x = jnp.asarray(1e4 + RNG.standard_normal((4, 64)), jnp.float32)
    exact = (np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True)) / np.asarray(
        x, np.float64
    ).std(-1, keepdims=True)
    variables = nn.LayerNorm().init(jax.random.key(0), x)
    errors = [
        np.abs(norm.apply(variables, x) - exact).max()
        for norm in (hn.Norm(kind="layernorm"), nn.LayerNorm(use_fast_variance=True))
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis_name": "batch"}, r"^axis_name=batch: hn\.Norm has axis_name=None only"),
        ({"axis_index_groups": [[0, 1]]}, r"^axis_index_groups="),
        ({"use_fast_variance": True}, r"^use_fast_variance=True: hn\.Norm has use_fast_variance=False only"),
        ({"force_float32_reductions": False}, r"^force_float32_reductions=False: "),
        ({"kind": "crmsnorm", "reduction_axes": (1, 2)}, r"^reduction_axes=\(1, 2\): kind='crmsnorm' .*must be -1"),
        ({"feature_axes": 3}, r"^feature_axes=3: x has 3 axes"),
    ],
    ids=str,
)
def test_what_norm_cannot_do_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        hn.Norm(**arguments).init(jax.random.key(0), jnp.ones((2, 3, 4)))


def test_crmsnorm_has_flaxs_dtypes_too():
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert hn.Norm(kind="crmsnorm").init_with_output(jax.random.key(0), x)[0].dtype == jnp.float32
    assert hn.Norm(kind="crmsnorm", use_scale=False).apply({}, x).dtype == jnp.bfloat16
