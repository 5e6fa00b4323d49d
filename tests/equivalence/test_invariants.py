"""The invariants of the forms: what breaks one is caught and named, and rounding alone breaks none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compared_models import layernorm_model

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence as eq
from hybridnorm_jax.equivalence import decoder_forms, transforms
from hybridnorm_jax.equivalence.comparison import compare_forms
from hybridnorm_jax.equivalence.invariants import InvariantError, assert_measured, tolerances
from hybridnorm_jax.equivalence.measurements import Measured, centring_defects
from hybridnorm_jax.equivalence.model_params import assert_params
from hybridnorm_jax.model.norm_functions import padding_defect, zero_mean_defect


def test_recentring_along_the_wrong_axis_is_caught_and_named(small_config, random_params, tokens, monkeypatch):
    """The bug of the released JAX layer: the mean over the input axis of an (in, out) kernel."""
    keys = {"scheme": "pre", "mlp_dim": 32}
    config, params = layernorm_model(small_config, random_params, keys, "float32")
    limits = tolerances(config)
    assert_measured(1, jax.jit(lambda p: compare_forms(config, p, tokens))(params), limits)

    def wrong(params, layout):
        centred = transforms.recenter(params, layout)
        kernel = jnp.asarray(params["run_0"]["feed_forward"]["down"]["kernel"])
        centred["run_0"]["feed_forward"]["down"]["kernel"] = kernel - kernel.mean(1, keepdims=True)
        return centred

    monkeypatch.setattr(decoder_forms, "recenter", wrong)
    measured = jax.jit(lambda p: compare_forms(config, p, tokens))(params)
    with pytest.raises(InvariantError, match=r"step 7: run_0/feed_forward/down/kernel is not centred: "):
        assert_measured(7, measured, limits)
    # Each of the others sees it too.
    for name in ("stream", "stored", "last", "norm"):
        with pytest.raises(InvariantError, match=r"after block [123] \(0: the embedding\)"):
            assert_measured(7, Measured(**{name: getattr(measured, name)}), limits)
    with pytest.raises(InvariantError, match=r"logits of pre_crmsnorm differ by [01]\.\d+, at most 0\.001"):
        assert_measured(7, Measured(logits=measured.logits), limits)


def test_compressing_what_is_not_centred_is_caught(small_config, random_params, tokens, monkeypatch):
    config, params = layernorm_model(small_config, random_params, {"scheme": "pre"}, "float32")
    monkeypatch.setattr(decoder_forms, "recenter", lambda params, layout: params)
    measured = jax.jit(lambda p: compare_forms(config, p, tokens))(params)
    with pytest.raises(InvariantError, match=r"step 1: run_0/attention/out/kernel is not centred: "):
        assert_measured(1, measured, tolerances(config))


def test_nan_is_a_violation_of_the_block_it_is_in():
    limits = tolerances(hn.ModelConfig())
    with pytest.raises(InvariantError, match=r"step 3, after block 2 .*: the stream is not centred: .* is nan"):
        assert_measured(3, Measured(stream=jnp.array([0.0, 0.0, jnp.nan, 1.0])), limits)


def test_nan_is_measured_as_nan_everywhere(small_config, random_params, tokens):
    config, params = layernorm_model(small_config, random_params, {"scheme": "pre"}, "float32")
    assert np.isnan(zero_mean_defect(jnp.array([np.nan, 1.0, 2.0])))
    assert np.isnan(padding_defect(jnp.array([1.0, 2.0, np.nan]), 3))
    kernel = params["run_0"]["attention"]["out"]["kernel"].copy()
    kernel[1, 0, 0, 0] = np.nan
    params["run_0"]["attention"]["out"]["kernel"] = kernel
    measured = compare_forms(config, params, tokens)
    with pytest.raises(InvariantError, match=r"step 1: run_0/attention/out/kernel is not centred: .* is nan"):
        assert_measured(1, measured, tolerances(config))


@pytest.mark.parametrize(("dtype", "param_dtype"), [("float64", "float32"), ("float32", "float64")])
def test_no_false_alarm_where_dtypes_are_mixed(dtype, param_dtype, small_config, random_params, tokens):
    with jax.enable_x64(True):
        config = small_config(scheme="pre", norm="layernorm", dtype=dtype, param_dtype=param_dtype)
        measured = jax.jit(lambda p: compare_forms(config, p, tokens))(random_params(config))
        assert_measured(1, measured, tolerances(config))


def test_defects_of_a_bfloat16_model_stay_apart_from_bugs(small_config, random_params, tokens):
    """What rounding leaves is within the limits, and the limits are well below a stream that is not centred."""
    config = small_config(scheme="pre", norm="layernorm", dtype="bfloat16", num_layers=12)
    params = random_params(config)
    measured = compare_forms(config, params, tokens)
    assert_measured(1, measured, tolerances(config))
    assert tolerances(config)["trained"] <= 0.3
    assert max(map(float, centring_defects(params, eq.decoder_layout(config)).values())) > 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.update(final_norm={"scale": jnp.ones(32)}), "final_norm/scale: is left unfolded"),
        (lambda p: p["head"].pop("kernel"), "head/kernel: missing"),
        (lambda p: p["head"].update(kernel=jnp.ones((31, 61))), "head/kernel"),
        (lambda p: p["head"].update(kernel=jnp.ones((32, 61), jnp.bfloat16)), "head/kernel"),
        (lambda p: p["head"].update(kernel=jnp.ones(32)), "head/kernel"),
        (lambda p: p.update(stranger={"kernel": jnp.ones(3)}), "stranger/kernel: has no place"),
    ],
    ids=["unfolded", "missing", "width", "dtype", "rank", "left_over"],
)
def test_static_invariants_name_the_leaf(spoil, message, small_config, random_params):
    config, params = layernorm_model(small_config, random_params, {"scheme": "pre"}, "float32")
    form, converted = eq.to_pre_rmsnorm(config, params)
    converted = jax.tree.map(lambda leaf: leaf, converted)
    spoil(converted)
    with pytest.raises(AssertionError, match=message):
        jax.eval_shape(lambda p: assert_params(form, p), converted)
