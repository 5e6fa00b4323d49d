"""What the weights of each initializer look like, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.model.initializers import truncated_normal
from tests.model.fresh_leaves import fresh_leaves

L = 4
KEPT = 0.98658  # standard deviation of a standard normal cut at 3, not rescaled: from its density, not from our code
# (initializer, path in the block) -> factor on init_std, for layers 1..L
EXPECTED = {
    ("normal", "attention/out"): [1] * L,
    ("depth_scaled", "attention/out"): [(2 * depth) ** -0.5 for depth in range(1, L + 1)],
    ("depth_scaled", "feed_forward/down"): [(2 * depth) ** -0.5 for depth in range(1, L + 1)],
    ("depth_scaled", "feed_forward/up"): [1] * L,
    ("megatron", "attention/out"): [(2 * L) ** -0.5] * L,
    ("megatron", "feed_forward/down"): [(2 * L) ** -0.5] * L,
    ("megatron", "attention/value"): [1] * L,
    ("deepnorm", "attention/query"): [1] * L,
    ("deepnorm", "attention/key"): [1] * L,
    ("deepnorm", "attention/value"): [(8 * L) ** -0.25] * L,
    ("deepnorm", "attention/out"): [(8 * L) ** -0.25] * L,
    ("deepnorm", "feed_forward/gate"): [(8 * L) ** -0.25] * L,
    ("deepnorm", "feed_forward/down"): [(8 * L) ** -0.25] * L,
    ("b2t", "attention/query"): [L**-0.5] * L,
    ("b2t", "feed_forward/down"): [L**-0.5] * L,
}


@pytest.fixture(scope="module")
def leaves_of():
    drawn = {}

    def draw(initializer):
        if initializer not in drawn:
            config = hn.ModelConfig(
                scheme="hybrid_star", d_model=128, num_layers=L, num_heads=4, vocab_size=997, initializer=initializer
            )
            asked = {path for name, path in EXPECTED if name == initializer} | {"embedding", "head", "attention/query"}
            drawn[initializer] = config, fresh_leaves(config, "|".join(asked))
        return drawn[initializer]

    return draw


@pytest.mark.parametrize(("initializer", "path"), EXPECTED)
def test_standard_deviation_of_every_layer(initializer, path, leaves_of):
    config, leaves = leaves_of(initializer)
    kernels = np.concatenate([leaves[f"run_{run}/{path}/kernel"] for run in (0, 1)])
    for kernel, factor in zip(kernels, EXPECTED[initializer, path], strict=True):
        # 16384 samples: the standard deviation is known to 0.55 %; four of those.
        np.testing.assert_allclose(kernel.std(), KEPT * factor * config.init_std, rtol=0.022)
        assert np.abs(kernel).max() <= 3 * factor * config.init_std * 1.0001


def test_embedding_and_head(leaves_of):
    for initializer in ("megatron", "b2t"):
        config, leaves = leaves_of(initializer)
        for path in ("token_embedding/embedding", "head/kernel"):
            np.testing.assert_allclose(leaves[path].std(), KEPT * config.init_std, rtol=0.01)
    assert config.init_std == pytest.approx((2.5 * 128) ** -0.5)


def test_simple_gpt_starts_as_its_authors_code_does():
    """0.02 inside the blocks, 1 of the embedding, 1/sqrt(d) of the head; read off Ocram7/SimpleGPT."""
    sizes = {"d_model": 128, "num_layers": L, "num_heads": 4, "vocab_size": 997}
    for tied, of_embedding in ((False, 1.0), (True, 128**-0.5)):
        config = hn.ModelConfig(scheme="simple_norm", tie_embeddings=tied, **sizes)
        leaves = fresh_leaves(config, "embedding|head|(query|out)/kernel")
        np.testing.assert_allclose(leaves["token_embedding/embedding"].std(), KEPT * of_embedding, rtol=0.01)
        query, out = (leaves[f"run_0/attention/{name}/kernel"] for name in ("query", "out"))
        np.testing.assert_allclose(query[0].std(), KEPT * 0.02, rtol=0.022)
        np.testing.assert_allclose(out[1].std(), KEPT * 0.01, rtol=0.022)
        if not tied:
            np.testing.assert_allclose(leaves["head/kernel"].std(), KEPT * 128**-0.5, rtol=0.01)


def test_the_standard_deviation_follows_the_initializer_unless_it_is_set():
    usual = (2.5 * 16) ** -0.5
    base = hn.ModelConfig(scheme="pre", d_model=16, num_layers=2, num_heads=2, vocab_size=7)
    assert base.init_std == pytest.approx(usual)
    assert hn.ModelConfig(scheme="pre", d_model=16, num_heads=2, initializer="simple_gpt").init_std == 0.02
    assert dataclasses.replace(base, scheme="simple_norm").init_std == pytest.approx(usual)
    assert base.with_scheme("simple_norm").init_std == 0.02
    assert base.with_scheme("simple_norm").with_scheme("span").init_std == pytest.approx(usual)
    assert base.with_scheme("simple_norm", initializer="normal").init_std == pytest.approx(usual)
    assert dataclasses.replace(base, init_std=0.5).with_scheme("simple_norm").init_std == 0.5


def test_layers_differ_from_each_other(leaves_of):
    kernels = leaves_of("normal")[1]["run_1/attention/query/kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_the_branch_norm_of_the_7b_model_starts_small():
    config = hn.ModelConfig(scheme="hybrid_output_norm", d_model=16, num_layers=8, num_heads=2, vocab_size=7)
    leaves = fresh_leaves(config, "_norm/scale")
    np.testing.assert_allclose(leaves["run_1/attention_branch_norm/scale"], 0.25)
    np.testing.assert_allclose(leaves["run_1/attention_post_norm/scale"], 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_are_drawn_in_float32_and_rounded_once(dtype):
    draw, key = truncated_normal(0.0361), jax.random.key(0)
    exact = draw(key, (10_000,), jnp.float32)
    np.testing.assert_array_equal(draw(key, (10_000,), dtype), exact.astype(dtype))
