"""Attention over a sequence that eight devices share is that of one device, whatever computes it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal
from test_attention_backends import (
    ROUNDED_WEIGHTS,
    as_written,
    assert_equal_to,
    context_and_gradients,
    documents,
    draw,
    many_far_keys,
    textbook,
)

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import MeshSection, RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels import split_sequence
from hybridnorm_jax.kernels import tpu_splash as attention_splash
from hybridnorm_jax.kernels.attention_backends import softmax_attention
from hybridnorm_jax.kernels.attention_on_mesh import sequence_axes
from hybridnorm_jax.kernels.token_logits import token_logits
from hybridnorm_jax.kernels.zigzag import zigzag
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh
from hybridnorm_jax.model.loss import chunked_cross_entropy, cross_entropy
from hybridnorm_jax.training.program import Program


def times(kernel, hidden, targets):
    return token_logits(hidden @ kernel, targets)


def _mesh(**sizes):
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def _attention(segment_ids, backend="xla"):
    return functools.partial(softmax_attention, segment_ids=segment_ids, backend=backend)


@pytest.mark.parametrize(("shards", "seq"), [(2, 8), (3, 12), (8, 32)])
def test_every_device_computes_as_much(shards, seq):
    rows = zigzag(seq, shards).reshape(shards, -1)
    assert sorted(rows.reshape(-1)) == list(range(seq))
    seen = (rows + 1).sum(1)  # a position sees itself and all before it
    assert len(set(seen)) == 1
    for device, (low, high) in enumerate(rows.reshape(shards, 2, -1)[..., 0]):
        assert (low, high) == (device * seq // (2 * shards), (2 * shards - 1 - device) * seq // (2 * shards))


@pytest.mark.parametrize(
    ("half", "block"), [(8, 8), (512, 512), (2048, 512), (514, 257), (521, 521), (1042, 521), (768, 384)]
)
def test_no_length_makes_tiny_blocks_of_keys(half, block):
    assert split_sequence._block_length(half) == block


@pytest.mark.parametrize(
    ("sizes", "seq", "kv_heads", "segmented"),
    [
        ({"context": 8}, 80, 1, True),
        ({"context": 4, "tensor": 2}, 64, 4, False),
        ({"context": 2, "tensor": 4}, 64, 2, True),
        ({"data": 2, "context": 3}, 66, 2, False),
        ({"context": 2}, 48, 2, True),
        ({"context": 2}, 188, 2, True),  # a half is 47, a prime number beyond BLOCK
    ],
    ids=str,
)
def test_xla_in_shares_is_softmax_attention(sizes, seq, kv_heads, segmented, monkeypatch):
    monkeypatch.setattr(split_sequence, "BLOCK", 5)  # several blocks of keys to each half
    segment_ids = documents(2, seq) if segmented else None
    with jax.enable_x64(True):
        inputs = draw(2, seq, 4, kv_heads, 8, np.float64)
        expected = context_and_gradients(functools.partial(textbook, segment_ids=segment_ids), *inputs)
        with use_mesh(_mesh(**sizes)):
            assert sequence_axes(seq) == ("context",)
            got = context_and_gradients(_attention(segment_ids), *inputs)
    assert_equal_to(expected, got, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_narrow_dtypes_stay_within_their_rounding(dtype, tolerance):
    with jax.enable_x64(True):
        rounded = draw(2, 128, 4, 2, 16, dtype)
        expected = context_and_gradients(textbook, *(x.astype(np.float64) for x in rounded))
        with use_mesh(_mesh(context=4)):
            got = context_and_gradients(_attention(None), *rounded)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_equal_to(expected, got, tolerance)


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    query, key, value, expected = many_far_keys(seq=404)  # as in test_attention_backends.py
    with use_mesh(_mesh(context=2)):
        context = as_written(_attention(None))(query, key, value)
    np.testing.assert_allclose(np.asarray(context[0, -1], np.float64), expected, rtol=2.0**-9, atol=ROUNDED_WEIGHTS)


def test_scores_far_beyond_the_range_of_exp_do_no_harm():
    query, key, value, d_context = draw(1, 64, 2, 2, 8)
    with use_mesh(_mesh(context=4)):
        for array in context_and_gradients(_attention(documents(1, 64)), 1e4 * query, key, value, d_context):
            assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("sizes", "segmented"), diagonal([{"context": 2}, {"data": 2, "context": 2, "tensor": 2}], [False, True], apart=2)
)
def test_splash_in_shares_equals_xla(sizes, segmented, monkeypatch):
    interpreted = functools.partial(attention_splash.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention_splash.splash, "make_splash_mha", interpreted)
    inputs, segment_ids = draw(2, 512, 4, 2, 8), documents(2, 512) if segmented else None
    expected = context_and_gradients(_attention(segment_ids), *inputs)
    with use_mesh(_mesh(**sizes)):
        got = context_and_gradients(_attention(segment_ids, "splash"), *inputs)
    assert_equal_to(expected, got, 5e-6)


def test_the_backward_pass_keeps_a_devices_share_alone():
    """Not the gathered keys and values, and no scores."""
    query, key, value, _ = draw(1, 512, 2, 2, 8)
    with use_mesh(_mesh(context=8)):
        kept = jax.tree.leaves(jax.vjp(_attention(None), query, key, value)[1])
    assert sum(array.size for array in kept) <= 4 * query.size + 2 * 512 + 64


def test_chunks_of_the_loss_take_a_piece_of_every_stretch():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((2, 48, 8)), rng.standard_normal((8, 11))
    targets, weights = rng.integers(0, 11, (2, 48)), rng.random((2, 48))
    with jax.enable_x64(True):
        whole = cross_entropy(token_logits(jnp.asarray(hidden @ kernel), targets), jnp.asarray(weights))
        _, got = chunked_cross_entropy(times, kernel, jnp.asarray(hidden), targets, weights, chunk=12, stretches=4)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12)
    with pytest.raises(ValueError, match="stretches=5"):
        chunked_cross_entropy(times, kernel, jnp.asarray(hidden), targets, weights, chunk=12, stretches=5)


def test_a_length_that_the_mesh_cannot_share_is_refused_before_compilation(small_config):
    config = RunConfig(
        model=small_config(), train=TrainSection(seq_len=36, batch_size=8), mesh=MeshSection(data=2, context=4)
    )
    with pytest.raises(ConfigError, match=r"train\.seq_len=36: must be a multiple of 2 x context = 8, to be split"):
        Program(config)
    train = dataclasses.replace(config.train, seq_len=48, loss_chunk=6)
    with pytest.raises(ConfigError, match=r"train\.loss_chunk=6: must be a multiple of context = 4"):
        Program(dataclasses.replace(config, train=train))


@pytest.mark.parametrize(
    ("rules", "sizes", "message"),
    [
        ({"seq": ("data",)}, {"data": 8}, "mesh.data=8: cannot split both a sequence and its batch"),
        ({"seq": ("tensor",)}, {"tensor": 2, "data": 4}, "mesh.tensor=2: cannot split both a sequence and its heads"),
        (
            {"kv_heads": ("context",)},
            {"context": 2, "data": 4},
            "mesh.context=2: cannot split both a sequence and its kv_h",
        ),
    ],
)
def test_an_axis_that_would_split_two_dimensions_is_refused(small_config, rules, sizes, message):
    default = RunConfig()
    train = dataclasses.replace(default.train, seq_len=64)
    mesh = dataclasses.replace(default.mesh, **sizes, rules=rules)
    with pytest.raises(ConfigError, match=message):
        Program(dataclasses.replace(default, model=small_config(), train=train, mesh=mesh))


def test_splash_compiles_for_eight_tpu_chips(tpu_devices):
    mesh = make_mesh({"context": 4, "tensor": 2}, list(tpu_devices))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context", "tensor"))
    shape = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16, sharding=place)
    with use_mesh(mesh):
        gradient = jax.grad(lambda *qkv: _attention(None, "splash")(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
        text = jax.jit(gradient).lower(shape, shape, shape).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "collective-permute" in text


def test_a_long_sequence_is_shared_by_a_whole_model(small_config):
    """Logits of a decoder, positions split among eight devices."""
    config = small_config(scheme="hybrid_star")
    tokens = np.random.default_rng(0).integers(0, 61, (1, 64)).astype(np.int32)
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), tokens)
    expected = jax.jit(hn.Decoder(config).apply)(params, tokens)
    with use_mesh(_mesh(context=8)):
        got = jax.jit(hn.Decoder(config).apply)(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
