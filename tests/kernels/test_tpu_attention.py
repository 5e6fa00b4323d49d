"""The kernels for TPUs are attention of prepared heads, in value and gradient. They run interpreted here."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from hybridnorm_jax.kernels import tpu_attention, tpu_splash
from hybridnorm_jax.kernels.attention_backends import softmax_attention
from hybridnorm_jax.kernels.head_preparation import HeadNorm, Preparation
from hybridnorm_jax.kernels.score_rules import ScoreRules
from hybridnorm_jax.mesh.device_mesh import use_mesh
from hybridnorm_jax.model.attention import Attention
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.norm_functions import layer_norm, rms_norm
from hybridnorm_jax.model.rotation import rotation
from hybridnorm_jax.planning.collectives import read_collectives
from hybridnorm_jax.planning.memory_traffic import memory_traffic, total_bytes

AXES = ("data", "fsdp", "tensor")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(tpu_attention, "_interpret", True)


def draw(batch, seq, heads, kv_heads, head_dim, seed=0):
    """(query, key, value, d_context) in float64."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((batch, seq, n, head_dim)) for n in (heads, kv_heads, kv_heads, heads))


def documents(batch, seq, seed=0):
    """Segment ids of three documents of random lengths, and behind them of padding, as in a packed row."""
    ids = np.sort(np.random.default_rng(seed).integers(1, 4, (batch, seq)), axis=1).astype(np.int32)
    ids[:, seq - seq // 8 :] = 0
    return ids


def norm(head_dim, function, *, bias=False, seed=0):
    rng = np.random.default_rng(seed)
    scale, shift = 1 + 0.1 * rng.standard_normal(head_dim), 0.1 * rng.standard_normal(head_dim)
    return HeadNorm(scale, shift if bias else None, function, 1e-5)


def turn(rows, seq, rotary_dim, seed=0):
    """cos and sin of positions drawn at random, another for every sequence where rows > 1."""
    positions = np.random.default_rng(seed).integers(0, 5000, (rows, seq))
    return rotation(jnp.asarray(positions), rotary_dim, 1e4, jnp.float64)


def textbook(query, key, value, norms, by, segment_ids, scale=None):
    """Norms, rotation and the whole matrix of weights, as the papers write them."""

    def normalized(x, norm):
        if norm is None:
            return x
        centre = x.mean(-1, keepdims=True) if norm.function is layer_norm else 0
        x = x - centre
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon)
        return x * norm.scale + (0 if norm.bias is None else norm.bias)

    def rotated(x):
        if by is None:
            return x
        cos, sin = by
        half = cos.shape[-1]
        pair = jax.lax.complex(x[..., :half], x[..., half : 2 * half]) * jax.lax.complex(cos, sin)
        return jnp.concatenate([pair.real, pair.imag, x[..., 2 * half :]], axis=-1)

    query, key, value = (
        rotated(normalized(query, norms[0])),
        rotated(normalized(key, norms[1])),
        normalized(value, norms[2]),
    )
    readers = query.shape[2] // key.shape[2]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, jnp.repeat(key, readers, axis=2))
    visible = np.tri(query.shape[1], dtype=bool)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(value, readers, axis=2))


def context_and_gradients(attention, query, key, value, norms, d_context):
    @jax.jit
    def both(*inputs):
        context, pull = jax.vjp(attention, *inputs)
        return context, *pull(d_context)

    return [np.asarray(array, np.float64) for array in jax.tree.leaves(both(query, key, value, norms))]


def compare(
    dtype, tolerance, *, shape=(2, 130, 4, 2, 8), norms=(None, None, None), by=None, segmented=False, scale=None
):
    """The kernels in this dtype, against the textbook in float64 of the same inputs; relative to the largest."""
    segment_ids = documents(*shape[:2]) if segmented else None
    if segmented == "mixed":
        segment_ids = np.random.default_rng(1).permuted(segment_ids, axis=1)
    with jax.enable_x64(True):
        rounded = [jnp.asarray(x, dtype) for x in draw(*shape)]
        *wide, d_context = [x.astype(np.float64) for x in rounded]
        reference = functools.partial(textbook, by=by, segment_ids=segment_ids, scale=scale)
        expected = context_and_gradients(reference, *wide, norms, d_context)
    by = jax.tree.map(lambda table: table.astype(jnp.float32), by)
    norms = jax.tree.map(jnp.float32, norms)

    def ours(query, key, value, norms):
        preparation = Preparation(*norms, rotation=by)
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        rules = ScoreRules(scale=scale)
        return softmax_attention(
            query, key, value, segment_ids=ids, rules=rules, preparation=preparation, backend="splash"
        )

    got = context_and_gradients(ours, *rounded[:3], norms, rounded[3])
    for reference, array in zip(expected, got, strict=True):
        np.testing.assert_allclose(array, reference, rtol=0, atol=tolerance * max(1, np.abs(reference).max()))


CASES = {
    "plain": {},
    "documents": {"segmented": True},
    "documents in no order": {"segmented": "mixed"},
    "one key head": {"shape": (1, 256, 3, 1, 24)},
    "a short sequence": {"shape": (2, 5, 2, 2, 8), "segmented": True},
    "several blocks": {"shape": (1, 1100, 2, 1, 16), "segmented": True},
    "rotated": {"by": (1, 8)},
    "another scale": {"scale": 0.9},
    "half the channels, other positions in each sequence": {"by": (2, 4), "segmented": True},
    "normalized": {"norms": (rms_norm, rms_norm, rms_norm)},
    "normalized with bias, without the values": {"norms": (layer_norm, layer_norm, None), "by": (1, 8)},
}


def arguments(case):
    """compare's arguments of a case, where a norm is named by its function and a rotation by (rows, rotary_dim)."""
    case = {"shape": (2, 130, 4, 2, 8)} | CASES[case]
    _, seq, _, _, head_dim = case["shape"]
    functions = case.get("norms", (None, None, None))
    case["norms"] = tuple(
        function and norm(head_dim, function, bias=function is layer_norm, seed=seed)
        for seed, function in enumerate(functions)
    )
    if "by" in case:
        with jax.enable_x64(True):
            rows, rotary_dim = case["by"]
            case["by"] = turn(rows, seq, rotary_dim)
    return case


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_attention_of_prepared_heads(interpreted, case):
    # A sum of up to 1,100 products, each rounded to 2^-24, of exponentials whose arguments are rounded likewise.
    compare(jnp.float32, 5e-6, **arguments(case))


@pytest.mark.parametrize("case", ["documents", "normalized with bias, without the values"])
def test_in_bfloat16_only_operands_of_products_are_rounded(interpreted, case):
    # Heads, weights, gradients of logits, and the result: at most four roundings of 2^-9 meet in an element, and each
    # sum over keys averages the errors of its terms. Twice that for logits, whose rounding exp magnifies.
    compare(jnp.bfloat16, 8 * 2.0**-9, **arguments(case))


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.long)])
def test_on_a_mesh_each_device_computes_its_share(interpreted, shape):
    case = arguments("normalized with bias, without the values") | {"shape": (4, 130, 4, 1, 8), "segmented": True}
    with use_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)):
        compare(jnp.float32, 5e-6, **case)


@pytest.mark.parametrize("seq", [128, 130])
def test_devices_that_split_the_sequences_of_a_batch_exchange_nothing(interpreted, seq):
    mesh = jax.make_mesh((8, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec("data"))
    heads = [jax.ShapeDtypeStruct((8, seq, count, 8), jnp.float32, sharding=place) for count in (2, 1, 1, 2)]

    def gradients(query, key, value, d_context):
        _, pull = jax.vjp(functools.partial(softmax_attention, backend="splash"), query, key, value)
        return pull(d_context)

    with use_mesh(mesh):
        text = jax.jit(gradients, out_shardings=place).lower(*heads).compile().as_text()
    assert read_collectives(text).kinds == {}


def test_scores_far_beyond_the_range_of_exp_do_no_harm(interpreted):
    query, key, value, d_context = (jnp.asarray(x, jnp.float32) for x in draw(1, 200, 2, 2, 8))
    attention = functools.partial(softmax_attention, backend="splash")
    context, pull = jax.vjp(attention, 1e4 * query, key, value)
    for array in (context, *pull(d_context)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_what_fills_a_sequence_up_has_a_norm_without_epsilon(interpreted, function):
    """A norm of zeros would be 0 / 0, which no mask keeps out of a sum."""
    norms = tuple(dataclasses.replace(norm(8, function, seed=seed), epsilon=0.0) for seed in range(3))
    compare(jnp.float32, 5e-6, shape=(2, 5, 2, 2, 8), norms=norms)


def test_attention_in_a_model_gives_its_kernels_unprepared_heads(interpreted):
    """The module with all norms and RoPE: same values and gradients of all parameters as with the XLA backend."""
    x = jax.random.normal(jax.random.key(0), (2, 40, 32))

    def gradients(backend):
        module = Attention(
            num_heads=4, num_kv_heads=2, q_norm="head", k_norm="head", v_norm="head", rope_theta=1e4, backend=backend
        )
        params = module.clone(backend="xla").init(jax.random.key(1), x)
        # Weights of 0.02 leave every score near 0.
        params = jax.tree.map(lambda kernel: 4 * kernel, params)
        return jax.jit(jax.value_and_grad(lambda params: jnp.sin(module.apply(params, x)).sum()))(params)

    expected, got = gradients("xla"), gradients("splash")
    for reference, array in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(array, reference, rtol=0, atol=1e-5 * max(1, np.abs(reference).max()))


def test_a_head_that_no_core_holds_is_left_to_splash_attention(monkeypatch):
    assert tpu_attention.fits(seq=4096, head_dim=128, dtype=jnp.bfloat16)
    assert tpu_attention.fits(seq=8192, head_dim=64, dtype=jnp.bfloat16)
    assert not tpu_attention.fits(seq=32768, head_dim=128, dtype=jnp.bfloat16)
    monkeypatch.setattr(tpu_splash, "tpu_attention", None)
    interpreted = functools.partial(tpu_splash.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(tpu_splash.splash, "make_splash_mha", interpreted)
    monkeypatch.setattr(tpu_splash, "fits", lambda **_: False)
    compare(jnp.float32, 5e-6, **arguments("normalized with bias, without the values"))


# ---- The TPU compiler works without a TPU.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_what_fits_compiles(tpu_devices, head_dim, dtype):
    """For a v5p, whose core has half the memory of a v5e's, with all that norms can have."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    lengths = range(512, 8193, 512)
    seq = max(seq for seq in lengths if tpu_attention.fits(seq=seq, head_dim=head_dim, dtype=dtype))
    text = _gradient(device, seq=seq, head_dim=head_dim, dtype=dtype, norms="head", theta=1e4, norm="layernorm")
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_norms_and_rotation_move_no_bytes(tpu_devices, head_dim):
    """Not around attention either: the whole module reads and writes as much as without them."""
    plain, prepared = (
        total_bytes(memory_traffic(_gradient(tpu_devices[0], seq=2048, head_dim=head_dim, **options)))
        for options in ({"norms": None, "theta": None}, {"norms": "head", "theta": 1e4})
    )
    assert prepared <= 1.01 * plain


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("all_but_attention", 1), ("full", 2)])
def test_the_policy_that_keeps_attention_computes_it_once(tpu_devices, policy, times):
    """In the compiled program: it keeps the context and the logarithm of the denominator."""
    config = ModelConfig(
        vocab_size=128,
        d_model=128,
        num_layers=3,
        num_heads=2,
        mlp_dim=128,
        scheme="pre",
        remat=policy,
        attention="splash",
        dtype="bfloat16",
    )
    place = SingleDeviceSharding(tpu_devices[0])
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=place)
    params = jax.eval_shape(Decoder(dataclasses.replace(config, attention="xla")).init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), params)

    def loss(params, tokens):
        return Decoder(config).apply(params, tokens).sum()

    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    kernels = re.findall(r"%causal_attention_(forward|backward)[.\d]* = .* custom-call", text)
    assert (kernels.count("forward"), kernels.count("backward")) == (times, 1)


def _gradient(device, *, seq, head_dim, norms, theta, dtype=jnp.bfloat16, norm="rmsnorm"):
    """The compiled text of a training step of an Attention of 4 heads."""
    place = SingleDeviceSharding(device)
    module = Attention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        q_norm=norms,
        k_norm=norms,
        v_norm=norms,
        norm=norm,
        norm_bias=norm == "layernorm",
        rope_theta=theta,
        backend="splash",
        dtype=dtype,
    )
    x = jax.ShapeDtypeStruct((2, seq, 512), dtype, sharding=place)
    ids = jax.ShapeDtypeStruct((2, seq), jnp.int32, sharding=place)
    params = jax.eval_shape(module.clone(backend="xla").init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), params)

    def loss(params, x, ids):
        return (module.apply(params, x, segment_ids=ids) ** 2).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x, ids).compile().as_text()
