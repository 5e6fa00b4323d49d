"""nGPT and GeoNorm: what stays at length 1, where learned numbers start, and what else their formulas promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.schedules import step_numbers
from tests.authors_models import case, part

TINY = {"d_model": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 24, "vocab_size": 61}
# The axis of each matrix that lies along the embedding; inside a run the layers come first.
EMBED_AXIS = {
    "token_embedding/embedding": 1,
    "head/kernel": 0,
    "run_0/attention/query/kernel": 1,
    "run_0/attention/key/kernel": 1,
    "run_0/attention/value/kernel": 1,
    "run_0/attention/out/kernel": 3,
    "run_0/feed_forward/gate/kernel": 1,
    "run_0/feed_forward/up/kernel": 1,
    "run_0/feed_forward/down/kernel": 2,
}


def _init(config):
    return jax.jit(hn.Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _assert_unit(params):
    leaves = flatten_dict(params, sep="/")
    assert set(EMBED_AXIS) == {name for name in leaves if name.endswith(("kernel", "embedding"))}
    for name, axis in EMBED_AXIS.items():
        np.testing.assert_allclose(np.linalg.norm(leaves[name], axis=axis), 1, rtol=1e-6, err_msg=name)


def test_a_fresh_model_has_unit_vectors_and_scales_that_count_as_the_paper_says():
    config = hn.ModelConfig(scheme="ngpt", **TINY)
    params = _init(config)
    _assert_unit(params)
    scales = {name: leaf for name, leaf in flatten_dict(params, sep="/").items() if name.endswith("scale")}
    for name, leaf in scales.items():
        stored = 1.0 if name.startswith("run_0/feed_forward/") else 1 / 4
        np.testing.assert_array_equal(leaf, np.full_like(leaf, stored), err_msg=name)
    assert len(scales) == 6
    tokens = jnp.asarray([[3, 1, 4]])
    hidden = hn.Decoder(config).apply({"params": params}, tokens, return_hidden=True)
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), 1, rtol=1e-6)


def test_training_normalizes_the_matrices_as_the_authors_do():
    """The parameters before their normalize_matrices() and after it; both are in one golden."""
    _, config, golden = case("ngpt_rope_normalized")
    before, after = (hn.params_from_authors("ngpt", config, part(golden, prefix)) for prefix in ("before/", "param/"))
    found = hn.unit_matrices(before)
    # Numbers up to 1; both sides round the squares, their sum, its root and the quotient.
    tolerance = 8 * 2**-24
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_an_update_leaves_unit_vectors_and_nothing_decays():
    config = hn.ModelConfig(scheme="ngpt", **TINY)
    params = _init(config)
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)

    def after(weight_decay):
        section = OptimizerSection(weight_decay=weight_decay, clip=None, learning_rate=0.01, schedule="constant")
        numbers = step_numbers(section, steps=1, tokens_per_step=1, seed=0)
        optimizer = make_optimizer(section, numbers, unit_matrices=True)

        @jax.jit
        def update(gradient, params):
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return optax.apply_updates(params, updates)

        return update(gradient, params)

    updated = after(0.1)
    _assert_unit(updated)
    for ours, expected in zip(jax.tree.leaves(updated), jax.tree.leaves(after(0.0)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), updated, params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    with pytest.raises(ValueError, match=r"^params: keep_unit_matrices needs them"):
        hn.keep_unit_matrices().update(gradient, optax.EmptyState())


def test_bfloat16_keeps_directions_to_its_own_rounding(random_params, tokens):
    """Relative to a length of 1 every rounding is 2^-9; a block rounds the stream in a dozen places."""
    config = hn.ModelConfig(scheme="ngpt", **TINY)
    params = random_params(config)
    exact = hn.Decoder(config).apply({"params": params}, tokens, return_hidden=True)
    rounded = hn.Decoder(hn.ModelConfig(scheme="ngpt", dtype="bfloat16", **TINY)).apply(
        {"params": params}, tokens, return_hidden=True
    )
    assert float(jnp.linalg.norm(rounded.astype(jnp.float32) - exact, axis=-1).max()) < 2 * 24 * 2**-9


def test_geonorm_keeps_the_length_of_every_token_and_goes_as_far_as_the_branch_is_long():
    config = hn.ModelConfig(scheme="geonorm", **TINY)
    block = hn.Block(config=config, placement=config.placements[0])
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    params, apply = jax.jit(block.init)(jax.random.key(0), x), jax.jit(block.apply)
    y = apply(params, x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    assert float(jnp.abs(y - x).max()) > 1e-3
    # Branches that add nothing leave the stream where it is, and have a gradient.
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(apply(zero, x), x)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(lambda params: block.apply(params, x).sum()))(zero)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"joins": "chord"}, r"joins='chord': needs layer_scale='channel'"),
        ({"joins": "geodesic", "side": "written"}, r"joins='geodesic': needs residual_scale=1 and no side stream"),
        ({"joins": "geodesic", "residual_scale": 2.0}, r"joins='geodesic': needs residual_scale=1"),
        ({"joins": "product"}, r"joins='product' must be one of 'sum', 'chord', 'geodesic'"),
    ],
)
def test_joins_that_cannot_be(keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        hn.SublayerPlacement(**keys)


def test_experts_cannot_have_the_scales():
    with pytest.raises(hn.ConfigError, match=r"^model\.num_experts=4: model\.scheme=ngpt has norms or scales inside"):
        hn.ModelConfig(scheme="ngpt", **TINY, num_experts=4, experts_per_token=2)


def test_a_vector_of_zeros_has_no_direction_and_stays():
    table = {"token_embedding": {"embedding": jnp.asarray([[0.0, 0.0], [3.0, 4.0]])}}
    np.testing.assert_allclose(hn.unit_matrices(table)["token_embedding"]["embedding"], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"^sphere='yes': must be True or False"):
        hn.scheme("mine", sphere="yes")(lambda layer, num_layers: hn.BlockPlacement())
