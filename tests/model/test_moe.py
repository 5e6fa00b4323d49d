"""The mixture-of-experts layer is its formula, its losses are NumPy's, and nothing that it sows is lost."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal, others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.moe import MoE, RouterStatistics, choose_experts, router_statistics
from hybridnorm_jax.model.watched_streams import CHOSEN, ROUTER
from hybridnorm_jax.training.router_balance import all_layers
from tests.model.fresh_leaves import fresh_leaves

EMBED, MLP, EXPERTS, K = 12, 20, 6, 2
DISPATCHES = ("dense", "blocked", "ragged")
MOE = {"num_experts": 8, "experts_per_token": 3}


def _layer(**keys):
    return MoE(**({"num_experts": EXPERTS, "experts_per_token": K, "mlp_dim": MLP} | keys))


def _draw(layer, shape=(2, 7), seed=0, dtype=np.float64):
    """(x, parameters), every parameter random."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((*shape, EMBED)), dtype)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return x, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), dtype), shapes)


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _silu(x):
    return x / (1 + np.exp(-x))


def _by_hand(params, x, *, normalize=False):
    """One token after the other, in NumPy."""
    params = jax.tree.map(np.asarray, params)

    def project(name, row, expert=None):
        leaves = params[name] if expert is None else {key: leaf[expert] for key, leaf in params[name].items()}
        return row @ leaves["kernel"] + leaves.get("bias", 0)

    def dense(leaves, name, row):
        return row @ leaves[name]["kernel"] + leaves[name].get("bias", 0)

    y = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        row = np.asarray(x[place])
        p = _softmax(project("router", row))
        chosen = np.argsort(-(p + params.get("balance_bias", 0)))[:K]
        weights = p[chosen] / (p[chosen].sum() if normalize else 1)
        for expert, weight in zip(chosen, weights, strict=True):
            hidden = _silu(project("expert_gate", row, expert)) * project("expert_up", row, expert)
            y[place] += weight * project("expert_down", hidden, expert)
        if "shared" in params:
            shared = params["shared"]
            y[place] += dense(shared, "down", _silu(dense(shared, "gate", row)) * dense(shared, "up", row))
    return y


LAYERS = {
    "plain": {},
    "normalize_weights": {"normalize_weights": True},
    "shared_experts": {"shared_experts": 2},
    "balance_bias": {"balance_bias": True},
    "use_bias": {"use_bias": True},
    "all": {"use_bias": True, "shared_experts": 1, "balance_bias": True, "normalize_weights": True},
}
# Each dispatch with the most and with the least, and every key once: they are on both sides of the dispatch.
QUICK = [("plain", "dense"), ("all", "dense"), ("plain", "blocked"), ("all", "blocked"), ("plain", "ragged")]
QUICK += [("all", "ragged"), ("normalize_weights", "dense"), ("shared_experts", "dense"), ("balance_bias", "dense")]
QUICK += [("use_bias", "dense")]


@pytest.mark.parametrize(
    "case", others_are_long([(name, each) for name in LAYERS for each in DISPATCHES], QUICK), ids="-".join
)
def test_the_layer_is_its_formula(case):
    keys, dispatch = LAYERS[case[0]], case[1]
    layer = _layer(dispatch=dispatch, dtype=jnp.float64, param_dtype=jnp.float64, **keys)
    with jax.enable_x64(True):
        x, params = _draw(layer)
        y = jax.jit(layer.apply)({"params": params}, x)
    expected = _by_hand(params, x, normalize=keys.get("normalize_weights", False))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_gradients_of_the_layer_are_those_of_the_dense_dispatch():
    """Those of the router too, which come through the weights alone; the balance bias has none."""
    with jax.enable_x64(True):
        layers = {
            name: _layer(dispatch=name, use_bias=True, balance_bias=True, dtype=jnp.float64, param_dtype=jnp.float64)
            for name in ("dense", "blocked")
        }
        x, params = _draw(layers["dense"])
        expected, got = (
            jax.jit(jax.grad(lambda params, x, layer=layer: jnp.sin(layer.apply({"params": params}, x)).sum(), (0, 1)))(
                params, x
            )
            for layer in layers.values()
        )
    for (path, left), right in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-10, err_msg=jax.tree_util.keystr(path))
    assert np.abs(got[0]["router"]["kernel"]).max() > 1e-3
    assert not np.any(got[0]["balance_bias"])


def test_statistics_are_ten_lines_of_numpy():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((3, 5, EXPERTS))
    with jax.enable_x64(True):
        weights, chosen = choose_experts(jnp.asarray(logits), K)
        got = router_statistics(jnp.asarray(logits), chosen)
    rows = logits.reshape(-1, EXPERTS)
    p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    top = np.argsort(-p, axis=1)[:, :K]
    counts = np.zeros(EXPERTS)
    for row in top:
        counts[row] += 1
    fraction = counts / counts.sum()
    np.testing.assert_array_equal(np.asarray(chosen).reshape(-1, K), top)
    np.testing.assert_allclose(np.asarray(weights).reshape(-1, K), np.take_along_axis(p, top, 1), rtol=1e-12)
    np.testing.assert_allclose(got.fraction, fraction, rtol=1e-12)
    np.testing.assert_allclose(got.balance_loss, EXPERTS * (fraction * p.mean(0)).sum(), rtol=1e-12)
    np.testing.assert_allclose(got.z_loss, (np.log(np.exp(rows).sum(1)) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(1).mean(), rtol=1e-12)


def test_statistics_at_the_two_ends():
    even = jnp.zeros((1, 6, EXPERTS))
    around = (jnp.arange(6)[:, None] + jnp.arange(K))[None] % EXPERTS
    balanced = router_statistics(even, around)
    np.testing.assert_allclose(balanced.balance_loss, 1, rtol=1e-6)
    np.testing.assert_allclose(balanced.entropy, math.log(EXPERTS), rtol=1e-6)
    sure = jnp.full((1, 6, EXPERTS), -1e4).at[..., 2].set(1e4)
    collapsed = router_statistics(sure, jnp.full((1, 6, 1), 2))
    assert float(collapsed.balance_loss) == EXPERTS
    assert float(collapsed.entropy) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(collapsed))


@pytest.mark.parametrize("remat", others_are_long(["none", "full", "dots"], ["none", "full"]))
def test_nothing_sown_is_lost_under_scan_and_remat(remat, small_config, random_params, tokens):
    """Every layer's statistics are there, and they are those of the choices it made."""
    config = small_config(**MOE, remat=remat, scan_unroll=2 if remat == "dots" else 1)
    params = random_params(config)
    model = hn.Decoder(config)
    _, sown = jax.jit(lambda p: model.apply({"params": p}, tokens, mutable=[ROUTER, CHOSEN]))(params)
    layers = all_layers(sown)
    chosen = np.concatenate([sown[CHOSEN][run]["feed_forward"]["value"][0] for run in ("run_0", "run_1")])
    counts = np.stack([np.bincount(choices.reshape(-1), minlength=8) for choices in chosen])
    assert len({tuple(row) for row in counts}) == 3
    np.testing.assert_allclose(layers.fraction, counts / counts.sum(1, keepdims=True), atol=1e-7)
    for run in ("run_0", "run_1"):
        chosen = np.asarray(sown[CHOSEN][run]["feed_forward"]["value"][0])
        statistics = sown[ROUTER][run]["feed_forward"]["statistics"][0]
        assert chosen.shape[0] == len(statistics.z_loss)
        for layer, choices in enumerate(chosen):
            counts = np.bincount(choices.reshape(-1), minlength=8)
            np.testing.assert_allclose(statistics.fraction[layer], counts / counts.sum(), atol=1e-7)


def test_router_losses_have_the_gradient_of_an_unrolled_model(small_config, random_params, tokens):
    """Losses sown in a scan of rematerialized blocks pull on the same parameters as those of plain blocks."""

    def gradient(config):
        model = hn.Decoder(config)

        def loss(params):
            logits, sown = model.apply({"params": params}, tokens, mutable=[ROUTER])
            layers = all_layers(sown)
            return jnp.square(logits).mean() + layers.balance_loss.sum() + 0.1 * layers.z_loss.sum()

        return jax.jit(jax.grad(loss))

    config = small_config(**MOE, scheme="pre", dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        params = random_params(config)
        expected = gradient(dataclasses.replace(config, scan_unroll=3))(params)
        got = gradient(dataclasses.replace(config, remat="full"))(params)
    for (path, left), right in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-11, err_msg=jax.tree_util.keystr(path))
    assert np.abs(got["run_0"]["feed_forward"]["router"]["kernel"]).min(axis=(1, 2)).min() > 0


def test_layers_of_many_runs_come_in_order():
    """More than ten runs: run_10 comes after run_9."""
    statistics = {}
    for number in range(12):
        layers = jnp.asarray([2.0 * number, 2.0 * number + 1])
        fields = {field.name: layers for field in dataclasses.fields(RouterStatistics)}
        statistics[f"run_{number}"] = {"feed_forward": {"statistics": (RouterStatistics(**fields),)}}
    np.testing.assert_array_equal(all_layers({ROUTER: statistics}).z_loss, np.arange(24.0))


def test_a_bias_may_choose_experts_of_no_probability():
    logits = jnp.asarray([[[200.0, 0.0, 1.0, 0.0]]])
    bias = jnp.asarray([-1.1, 0.0, 0.0, 0.0])

    def weigh(logits):
        return choose_experts(logits, 2, normalize=True, balance_bias=bias)[0]

    np.testing.assert_allclose(weigh(logits)[0, 0], np.exp([0, 1]) / np.exp([0, 1]).sum(), rtol=1e-6)  # of 1 and 2
    assert np.isfinite(jax.grad(lambda logits: weigh(logits)[0, 0, 0])(logits)).all()


def test_sizes_and_starting_values_of_a_model(small_config):
    config = small_config(**MOE, shared_experts=2, initializer="megatron", init_std=0.02, d_model=64, mlp_dim=32)
    layer = fresh_leaves(config, "run_1/feed_forward")
    assert layer["run_1/feed_forward/shared/up/kernel"].shape == (2, 64, 64)
    assert layer["run_1/feed_forward/shared/down/kernel"].shape == (2, 64, 64)
    for name, std in (("router", 0.02), ("expert_gate", 0.02), ("expert_up", 0.02), ("expert_down", 0.02 / 6**0.5)):
        # Cut at 3 standard deviations, a normal's is 0.9866.
        np.testing.assert_allclose(
            layer[f"run_1/feed_forward/{name}/kernel"].std(), 0.9866 * std, rtol=0.06, err_msg=name
        )


@pytest.mark.parametrize("scheme", others_are_long(["hybrid_star", "span", "parallel", "deepnorm"], ["hybrid_star"]))
def test_causal(scheme, small_config, random_params, tokens):
    config = small_config(**MOE, scheme=scheme, balance_bias=True, shared_experts=1)
    params, apply = random_params(config), jax.jit(hn.Decoder(config).apply)
    logits = apply({"params": params}, tokens)
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    after = apply({"params": params}, changed)
    # Sorting by expert moves rows to other places of a block, so what is equal is so up to rounding.
    np.testing.assert_allclose(after[:, :7], logits[:, :7], atol=1e-4 * np.abs(logits).max())
    assert np.abs(after[:, 7:] - logits[:, 7:]).max() > 0.01 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("case", "dispatch"), diagonal(["a single token", "all to one expert", "every expert"], DISPATCHES[1:], apart=2)
)
def test_edges_give_right_numbers(case, dispatch):
    shape = (1, 1) if case == "a single token" else (2, 7)
    layer = _layer(dispatch=dispatch, use_bias=True, experts_per_token=EXPERTS if case == "every expert" else K)
    x, params = _draw(layer, shape, dtype=np.float32)
    if case == "all to one expert":  # and to a second one, with nothing for the other four
        params["router"]["bias"] = jnp.asarray([-50.0, 30.0, -50.0, 20.0, -50.0, -50.0])
    y, reference = (
        jax.jit(each.apply)({"params": params}, x) for each in (layer, dataclasses.replace(layer, dispatch="dense"))
    )
    np.testing.assert_allclose(y, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    if case != "every expert":
        expected = _by_hand(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(x, np.float64))
        for found in (y, reference):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_router_computes_in_float32_whatever_the_layer_does():
    layer = _layer(dtype=jnp.bfloat16)
    x, params = _draw(layer, dtype=np.float32)
    x = x.astype(jnp.bfloat16)
    _, sown = layer.apply({"params": params}, x, mutable=[ROUTER, CHOSEN])
    (statistics,) = sown[ROUTER]["statistics"]
    logits = jnp.einsum("bsd,de->bse", x.astype(jnp.float32), params["router"]["kernel"], precision="highest")
    _, chosen = choose_experts(logits, K)
    np.testing.assert_array_equal(sown[CHOSEN]["value"][0], chosen)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))
    np.testing.assert_allclose(statistics.z_loss, router_statistics(logits, chosen).z_loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts_per_token": 9}, r"model\.experts_per_token=9: must be between 1 and model\.num_experts=8"),
        ({"experts_per_token": 0}, r"model\.experts_per_token=0: must be at least 1"),
        ({"experts_per_token": None}, r"model\.experts_per_token=null: must be between 1"),
        ({"num_experts": -1}, r"model\.num_experts=-1: must be at least 0"),
        ({"num_experts": 0}, r"model\.experts_per_token=3: there are no experts; set model\.num_experts"),
        ({"num_experts": 0, "experts_per_token": None, "shared_experts": 1}, r"model\.shared_experts=1: there are no"),
        ({"shared_experts": -1}, r"model\.shared_experts=-1: must be at least 0"),
        ({"activation": "gelu"}, r"model\.activation=gelu: experts .* are swiglu"),
        ({"expert_dispatch": "bloked"}, r"model\.expert_dispatch=bloked: not known; did you mean 'blocked'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(keys, message, small_config):
    with pytest.raises(ConfigError, match=message):
        small_config(**(MOE | keys))


def test_the_module_alone_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="experts_per_token=7 must be between 1 and num_experts=6"):
        _layer(experts_per_token=7).init(jax.random.key(0), jnp.zeros((1, 1, EMBED)))
    with pytest.raises(ValueError, match=r"x: shape \(5, 12\) must be \(batch, seq, embed\)"):
        _layer().init(jax.random.key(0), jnp.zeros((5, EMBED)))
