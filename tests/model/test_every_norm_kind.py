"""Every kind of norm of the table, in whole models: on eight devices, packed, rematerialized, in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn

TINY = {"d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "vocab_size": 61}
WIDE = {"dtype": "float64", "param_dtype": "float64"}


def _config(kind, **keys):
    """Norms at the entrance, behind sums, on heads and outside the blocks."""
    keys = {"scheme": "hybrid_star", "embedding_norm": "true", "learned_embedding_scale": True} | keys
    return hn.ModelConfig(norm=kind, norm_bias=True, **(TINY | keys))


def _value_and_grad(config):
    def loss(params, tokens):
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        return jnp.square(jax.nn.log_softmax(logits)).mean()

    return jax.value_and_grad(loss)


SPLIT = {"channels": {"data": 2, "fsdp": 2, "tensor": 2}, "sequence": {"fsdp": 2, "context": 4}}
CASES = [*((kind, "channels") for kind in hn.NORM_KINDS), ("dyt", "sequence"), ("gated", "sequence")]
# Those that sum over channels: all but the last of them; and all, with matrices of its own besides.
QUICK_CASES = [("crmsnorm", "channels"), ("gated", "channels")]


@pytest.mark.parametrize("case", others_are_long(CASES, QUICK_CASES), ids="-".join)
def test_eight_devices_equal_one(case, random_params, tokens):
    """Loss and gradients, with heads, channels or tokens split; float64, so that a missing sum cannot hide."""
    kind, split = case
    tokens = np.tile(tokens, (4, 1))
    config = _config(kind, **WIDE)
    with jax.enable_x64(True):
        params = random_params(config)
        alone = jax.device_get(jax.jit(_value_and_grad(config))(params, tokens))
        mesh = hn.make_mesh(SPLIT[split])
        with hn.use_mesh(mesh):
            placed = jax.device_put(params, hn.tree_shardings(params, mesh))
            together = jax.device_get(jax.jit(_value_and_grad(config))(placed, tokens))
    for (path, ours), expected in zip(jax.tree.leaves_with_path(together), jax.tree.leaves(alone), strict=True):
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * max(1e-3, largest), err_msg=str(path))


@pytest.mark.parametrize("kind", others_are_long(hn.NORM_KINDS, ["gated"]))
def test_a_packed_document_is_what_it_would_be_alone(kind, random_params, tokens):
    config = _config(kind, **WIDE)
    ids = jnp.asarray(np.repeat([[0] * 5 + [1] * 7], 2, axis=0))
    places = jnp.asarray(np.repeat([[*range(5), *range(7)]], 2, axis=0))
    with jax.enable_x64(True):
        params = random_params(config)
        apply = jax.jit(hn.Decoder(config).apply)
        packed = apply({"params": params}, tokens, positions=places, segment_ids=ids)
        first, second = (apply({"params": params}, part) for part in (tokens[:, :5], tokens[:, 5:]))
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", others_are_long(["full", "dots"], ["full"]))
@pytest.mark.parametrize("kind", others_are_long(hn.NORM_KINDS, ["gated"]))
def test_rematerialization_changes_no_gradient(kind, policy, random_params, tokens):
    config = _config(kind, **WIDE)
    with jax.enable_x64(True):
        params = random_params(config)
        expected = jax.jit(_value_and_grad(config))(params, tokens)
        ours = jax.jit(_value_and_grad(dataclasses.replace(config, remat=policy)))(params, tokens)
        for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-12 * np.abs(right).max())


@pytest.mark.parametrize("kind", hn.NORM_KINDS)
def test_bfloat16_is_one_rounding_of_the_exact_norm(kind):
    """Of vectors so long that a sum in bfloat16 would stop growing, with the parameters in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(2 * rng.standard_normal((3, 4096)), jnp.bfloat16)
    norm = hn.Norm(kind=kind, use_bias=True, dtype=jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf: (leaf + 0.3 * rng.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5).astype(np.float32),
        norm.init(jax.random.key(0), x)["params"],
    )
    with jax.enable_x64(True):
        exact = hn.Norm(kind=kind, use_bias=True, dtype=jnp.float64).apply(
            {"params": jax.tree.map(np.float64, params)}, np.asarray(x, np.float64)
        )
    ours = norm.apply({"params": params}, x)
    assert ours.dtype == jnp.bfloat16
    # The result is rounded once, by at most 2^-8 of it. Before that sums of 4096 numbers in float32, in whatever order,
    # err by less than sqrt(4096) of its units of 2^-24, on the scale of the largest number.
    exact = np.asarray(exact)
    allowed = 2**-8 * np.abs(exact) + 64 * 2**-24 * np.abs(exact).max()
    assert (np.abs(np.asarray(ours, np.float64) - exact) <= allowed).all()


@pytest.mark.parametrize("kind", hn.NORM_KINDS)
def test_no_product_of_a_norm_is_left_to_the_rounding_of_a_device(kind):
    """A TPU would multiply float32 numbers as if they were bfloat16; a CPU does not show it."""
    norm = hn.Norm(kind=kind)
    x = jnp.ones((2, 32))
    jaxpr = jax.make_jaxpr(norm.apply)(norm.init(jax.random.key(0), x), x)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert all(set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST} for equation in products)
    assert len(products) == (2 if kind == "gated" else 0)


@pytest.mark.parametrize("kind", others_are_long(hn.NORM_KINDS, ["gated"]))
def test_a_model_in_bfloat16_is_near_float64(kind, tokens):
    config = _config(kind, embedding_norm="auto")
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), tokens)["params"]
    narrow = hn.Decoder(dataclasses.replace(config, dtype="bfloat16"))
    rounded = jax.jit(narrow.apply)({"params": params}, tokens)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, params)
        exact = np.asarray(jax.jit(hn.Decoder(dataclasses.replace(config, **WIDE)).apply)({"params": wide}, tokens))
    assert rounded.dtype == jnp.float32
    # As in test_decoder.py: a rounding to 8 bits errs by 2^-9 in the mean. A layer has 19 of activations, 7 of kernels,
    # which add up like a random walk over three layers, the scale of the embedding and the head.
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < (3 * 26 + 4) ** 0.5 * 2**-9
