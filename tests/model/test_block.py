"""One block of every scheme against its paper's equations, written out by hand, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import hybridnorm_jax as hn
from hybridnorm_jax.model.block import Dropout
from hybridnorm_jax.model.formula import scale_arrays, times
from hybridnorm_jax.model.layers import layer_inputs

L, LAYER = 4, 2  # l = 3
a = {"deepnorm": 8**0.25, "keel": 8.0}
s = 3**-0.5

# X -> X', with N(place, x) the norm at that place: ap = attention's pre, ab branch, ao post; fp, fb, fo likewise.
EQUATIONS = {
    "pre": lambda X, N, A, F: (Y := X + A(N("ap", X))) + F(N("fp", Y)),
    "post": lambda X, N, A, F: N("fo", (Y := N("ao", X + A(X))) + F(Y)),
    "hybrid": lambda X, N, A, F: (Z := N("ao", A(X) + X)) + F(Z),
    "hybrid_output_norm": lambda X, N, A, F: (Z := N("ao", N("ab", A(X)) + X)) + F(Z),
    "hybrid_depth_scaled": lambda X, N, A, F: (Z := N("ao", s * A(X) + X)) + s * F(Z),
    "span": lambda X, N, A, F: N("fo", X + F(N("ao", X + A(X)))),
    "sandwich": lambda X, N, A, F: (Y := X + N("ab", A(N("ap", X)))) + N("fb", F(N("fp", Y))),
    "reordered": lambda X, N, A, F: (Y := X + N("ab", A(X))) + N("fb", F(Y)),
    "deepnorm": lambda X, N, A, F: N("fo", a["deepnorm"] * (Y := N("ao", a["deepnorm"] * X + A(X))) + F(Y)),
    "layernorm_scaling": lambda X, N, A, F: (Y := X + A(s * N("ap", X))) + F(s * N("fp", Y)),
    "keel": lambda X, N, A, F: N("fo", a["keel"] * (Y := N("ao", a["keel"] * X + A(N("ap", X)))) + F(N("fp", Y))),
    "b2t": lambda X, N, A, F: N("fo", X + (Y := N("ao", X + A(X))) + F(Y)),
    "parallel": lambda X, N, A, F: X + A(N("ap", X)) + F(N("fp", X)),
    "pre_post": lambda X, N, A, F: (Z := N("ao", X + A(N("ap", X)))) + F(Z),
    "post_pre": lambda X, N, A, F: N("fo", (Y := X + A(X)) + F(N("fp", Y))),
    "qk_pre": lambda X, N, A, F: (Y := X + A(X)) + F(N("fp", Y)),
    "pre_kv_post": lambda X, N, A, F: (Z := N("ao", X + A(N("ap", X)))) + F(Z),
}
NAMES = {
    "ap": "attention_pre_norm",
    "ab": "attention_branch_norm",
    "ao": "attention_post_norm",
    "fp": "feed_forward_pre_norm",
    "fb": "feed_forward_branch_norm",
    "fo": "feed_forward_post_norm",
}


def _numpy_attention(params, x, placement, theta, eps):
    """softmax(N(q) N(k)^T / sqrt(d)) N(v), grouped, rotated: loops over heads and positions."""

    def norm(name, heads):
        extent = getattr(placement, name)
        if extent is None:
            return heads
        flat = heads if extent == "head" else heads.reshape(*heads.shape[:-2], -1)
        flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps) * params[name]["scale"]
        return flat.reshape(heads.shape)

    def rope(heads):
        half = heads.shape[-1] // 2
        angle = np.arange(heads.shape[1])[:, None] * theta ** (-np.arange(half) / half)
        turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    q, k, v = (np.einsum("bse,ehd->bshd", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    q, k, v = rope(norm("q_norm", q)), rope(norm("k_norm", k)), norm("v_norm", v)
    context = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        scores = k[b, : i + 1, h // group] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        context[b, i, h] = weights @ v[b, : i + 1, h // group] / weights.sum()
    return np.einsum("bshd,hde->bse", norm("context_norm", context), params["out"]["kernel"])


def _numpy_feed_forward(params, x):
    gate, up = x @ params["gate"]["kernel"], x @ params["up"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * up) @ params["down"]["kernel"]


@pytest.mark.parametrize("scheme", EQUATIONS)
def test_a_block_is_its_papers_equation(scheme, small_config, random_params):
    config = small_config(scheme=scheme, num_layers=L, dtype="float64", param_dtype="float64", norm_eps=1e-3)
    placement = config.placements[LAYER]
    with jax.enable_x64(True):
        run, number = next((r, i) for i, r in enumerate(config.runs) if r.start <= LAYER < r.start + r.length)
        index = LAYER - run.start
        stacked = random_params(config)[f"run_{number}"]
        params = jax.tree.map(lambda leaf: np.asarray(leaf[index], np.float64), stacked)
        X = np.random.default_rng(2).normal(size=(2, 6, 32))
        ours = hn.Block(config=config, placement=placement, layer=LAYER).apply({"params": params}, jnp.asarray(X))

    def norm(place, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * params[NAMES[place]]["scale"]

    expected = EQUATIONS[scheme](
        X,
        norm,
        lambda x: _numpy_attention(params["attention"], x, placement, config.rope_theta, 1e-3),
        lambda x: _numpy_feed_forward(params["feed_forward"], x),
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


def test_dropout_acts_on_the_branch_and_not_on_the_residual(small_config, random_params):
    config = small_config(scheme="pre", num_layers=1, dropout=0.5)
    (run,) = config.runs
    params = jax.tree.map(lambda leaf: leaf[0], random_params(config)["run_0"])
    silent = jax.tree.map(np.zeros_like, params) | {
        name: params[name] for name in params if name.endswith("norm")
    }  # branches give 0
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    block = hn.Block(config=config, placement=run.structure)

    def apply(params, seed):
        return block.apply({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(apply(silent, 0), x)
    assert not np.array_equal(apply(params, 0), apply(params, 1))
    np.testing.assert_array_equal(apply(params, 0), apply(params, 0))


def test_scales_are_multiplied_in_float32_and_rounded_once():
    """Rounded to bfloat16 first, DeepNorm's alpha at 24 layers would be 0.27 % too small."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.bfloat16)
    for alpha in (48**0.25, 3**-0.5, 7**-0.5):
        scale = jnp.float32(alpha)
        expected = (scale * x.astype(jnp.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(times(scale, x), expected)
        assert times(scale, x).dtype == jnp.bfloat16
        assert not np.array_equal(scale.astype(jnp.bfloat16) * x, expected)


@pytest.mark.parametrize("scheme", ["deepnorm", "layernorm_scaling", "hybrid_depth_scaled"])
def test_a_bfloat16_model_has_its_scales_in_float32(scheme, small_config):
    config = small_config(scheme=scheme, num_layers=5, dtype="bfloat16")
    (run,) = config.runs
    inputs = layer_inputs(run, config, {})
    alone = scale_arrays(run.layers[2].placement.feed_forward.scales, config.dtype)
    exact = run.layers[2].placement.feed_forward.scales
    for scanned, single, scale in zip(inputs.feed_forward, alone, exact, strict=True):
        if scale == 1.0:
            assert scanned is None
            assert single is None
        else:
            assert scanned[2] == single == np.float32(scale)
            assert scanned.dtype == single.dtype == jnp.float32


def test_dropout_divides_in_float32_and_rounds_once():
    """bfloat16 has no 0.9: divided by 0.8984, what is kept would be 0.17 % too large."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=4000), jnp.bfloat16)
    dropped = Dropout(0.1, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})
    kept = dropped != 0
    assert dropped.dtype == jnp.bfloat16
    # 4000 draws of probability 0.9 have a standard deviation of 19.
    assert abs(kept.sum() - 3600) < 100
    expected = (x.astype(jnp.float32) / jnp.float32(0.9)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dropped[kept], expected[kept])
    assert not np.array_equal(x / jnp.bfloat16(0.9), expected)


def test_dropout_is_flaxs_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 100)), jnp.float32)
    key = {"dropout": jax.random.key(3)}
    ours, theirs = (module(0.3, deterministic=False).apply({}, x, rngs=key) for module in (Dropout, nn.Dropout))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x, deterministic=True), x)
