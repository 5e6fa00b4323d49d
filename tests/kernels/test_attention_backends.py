"""Attention is what its formula says, whoever computes it; a backend that cannot do what is asked says so."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels import tpu_splash as attention_splash
from hybridnorm_jax.kernels.attention_backends import capability_of, resolve_backend, softmax_attention
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.kernels.score_rules import ScoreRules
from hybridnorm_jax.mesh.device_mesh import use_mesh

AXES = ("data", "fsdp", "tensor")


def draw(batch, seq, heads, kv_heads, head_dim, dtype=np.float32, seed=0):
    """(query, key, value, d_context)."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, seq, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def documents(batch, seq, seed=0):
    """Segment ids of three documents of random lengths, and behind them of padding, as in a packed row."""
    ids = np.sort(np.random.default_rng(seed).integers(1, 4, (batch, seq)), axis=1)
    ids[:, seq - seq // 8 :] = 0
    return jnp.asarray(ids)


def textbook(query, key, value, segment_ids=None):
    """The whole (seq, seq) matrix of weights at once."""
    readers = query.shape[2] // key.shape[2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, jnp.repeat(key, readers, axis=2)) / np.sqrt(query.shape[-1])
    visible = np.tri(query.shape[1], dtype=bool)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(value, readers, axis=2))


def with_gradients(attention):
    """(query, key, value, d_context) -> context and gradients; for several inputs of one shape it compiles once."""

    @jax.jit
    def both(query, key, value, d_context):
        context, pull = jax.vjp(attention, query, key, value)
        return context, *pull(d_context)

    return both


def context_and_gradients(attention, query, key, value, d_context):
    return with_gradients(attention)(query, key, value, d_context)


def assert_equal_to(expected, got, tolerance):
    for reference, array in zip(expected, got, strict=True):
        array, reference = np.asarray(array, np.float64), np.asarray(reference, np.float64)
        np.testing.assert_allclose(array, reference, rtol=0, atol=tolerance * max(1, np.abs(reference).max()))


@pytest.mark.parametrize(
    ("seq", "kv_heads", "segmented"), [(1, 4, False), (130, 1, True), (200, 4, False), (300, 2, True), (1100, 2, False)]
)
def test_xla_is_softmax_attention_in_value_and_gradient(seq, kv_heads, segmented):
    segment_ids = documents(2, seq) if segmented else None
    with jax.enable_x64(True):
        inputs = draw(2, seq, 4, kv_heads, 8, np.float64)
        expected = context_and_gradients(functools.partial(textbook, segment_ids=segment_ids), *inputs)
        got = context_and_gradients(functools.partial(softmax_attention, segment_ids=segment_ids), *inputs)
    assert_equal_to(expected, got, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_narrow_dtypes_stay_within_their_rounding(dtype, tolerance):
    with jax.enable_x64(True):
        rounded = draw(2, 200, 4, 2, 16, dtype)
        expected = context_and_gradients(textbook, *(x.astype(np.float64) for x in rounded))
        got = context_and_gradients(softmax_attention, *rounded)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_equal_to(expected, got, tolerance)


def many_far_keys(seq=401):
    """(query, key, value) in bfloat16, and the context of the last query in float64.

    The first key's score is 0. The others' is -6.0104, which lies between two values of bfloat16 that are 0.03 apart.
    Together they weigh as much as the first one, so an exponential of rounded scores is 1 % off in half the context.
    """
    query = np.zeros((1, seq, 1, 8))
    query[..., 0] = 8
    key = np.zeros((1, seq, 1, 8))
    key[:, 1:, :, 0] = -2.125
    value = np.full((1, seq, 1, 8), -1.0)
    value[:, 0] = 1
    other = np.exp(8 * -2.125 / np.sqrt(8))
    context = (1 - (seq - 1) * other) / (1 + (seq - 1) * other)
    return (*(jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)), context)


# In many_far_keys the weights of half the context are rounded once, for their product with the values.
ROUNDED_WEIGHTS = 2.0**-9 / 2


def as_written(function):
    """Compiled with every rounding that the source asks for; XLA otherwise leaves out those that are undone."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    query, key, value, expected = many_far_keys()
    last = np.asarray(as_written(softmax_attention)(query, key, value)[0, -1], np.float64)
    np.testing.assert_allclose(last, expected, rtol=2.0**-9, atol=ROUNDED_WEIGHTS)


def test_scores_far_beyond_the_range_of_exp_do_no_harm():
    query, key, value, d_context = draw(1, 70, 2, 2, 8)
    for array in context_and_gradients(softmax_attention, 1e4 * query, key, value, d_context):
        assert np.isfinite(array).all()


def test_later_tokens_change_nothing():
    one, other = draw(1, 300, 2, 1, 8), draw(1, 300, 2, 1, 8, seed=1)
    position = 150
    mixed = (jnp.concatenate([a[:, :position], b[:, position:]], axis=1) for a, b in zip(one, other, strict=True))
    attention = jax.jit(softmax_attention)
    np.testing.assert_array_equal(
        attention(*one[:3])[:, :position], attention(*tuple(mixed)[:3])[:, :position], strict=True
    )


def test_another_segment_changes_nothing_bit_for_bit():
    one, other = draw(1, 300, 2, 1, 8), draw(1, 300, 2, 1, 8, seed=1)
    border = 140
    segment_ids = jnp.asarray(np.arange(300) >= border, jnp.int32)[None]
    mixed = [jnp.concatenate([b[:, :border], a[:, border:]], axis=1) for a, b in zip(one, other, strict=True)]
    attention = functools.partial(softmax_attention, segment_ids=segment_ids)
    before_and_after = zip(*(context_and_gradients(attention, *inputs) for inputs in (one, mixed)), strict=True)
    for before, after in before_and_after:
        np.testing.assert_array_equal(before[:, border:], after[:, border:])
        assert np.any(before[:, :border] != after[:, :border])


def test_gradients_pass_through_scan_and_checkpoint():
    query, key, value, d_context = draw(2, 70, 2, 2, 8)

    def stack(attention, query, key, value):
        layer = jax.checkpoint(lambda stream, scale: (stream + attention(scale * stream, key, value), None))
        return jax.lax.scan(layer, query, jnp.array([0.5, 1.0, 1.5]))[0]

    expected = context_and_gradients(functools.partial(stack, textbook), query, key, value, d_context)
    got = context_and_gradients(functools.partial(stack, softmax_attention), query, key, value, d_context)
    assert_equal_to(expected, got, 5e-6)


def test_the_backward_pass_keeps_nothing_of_size_seq_squared():
    query, key, value, _ = draw(1, 512, 2, 1, 8)
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(softmax_attention, *qkv)[1], query, key, value))
    inputs_and_context = 2 * query.size + key.size + value.size
    assert sum(array.size for array in kept) == inputs_and_context + 2 * 512  # and one number per query and head


def test_a_policy_that_saves_products_keeps_no_scores_where_it_also_saves_ours():
    query, key, value, _ = draw(1, 512, 2, 2, 8)
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(policies.checkpoint_dots, policies.save_only_these_names(SAVED))
    attention = jax.checkpoint(softmax_attention, policy=policy)
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], query, key, value))
    assert max(array.size for array in kept) == query.size


def test_sequences_and_heads_on_different_devices_never_talk():
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    ids = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    inputs, segment_ids = draw(4, 200, 4, 2, 8), documents(4, 200)

    def both(query, key, value, d_context, segment_ids):
        attention = functools.partial(softmax_attention, segment_ids=segment_ids)
        return context_and_gradients(attention, query, key, value, d_context)

    expected = both(*inputs, segment_ids)
    with use_mesh(mesh):
        placed = [jax.device_put(array, place) for array in inputs]
        compiled = jax.jit(both).lower(*placed, jax.device_put(segment_ids, ids)).compile()
        got = compiled(*placed, jax.device_put(segment_ids, ids))
    text = compiled.as_text()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]
    assert all(array.sharding.is_equivalent_to(place, 4) for array in got)
    assert_equal_to(expected, got, 1e-6)


# ---- Who computes it.

FITS = {"dtype": "bfloat16", "head_dim": 64, "segment_ids": False}


def test_auto_takes_the_fused_kernel_where_it_can_do_what_is_asked():
    assert resolve_backend("auto", platform="gpu", **FITS) == "cudnn"
    assert resolve_backend("auto", platform="tpu", **FITS) == "splash"
    assert resolve_backend("auto", platform="tpu", **FITS | {"segment_ids": True}) == "splash"
    assert resolve_backend("auto", platform="cpu", **FITS) == "xla"
    for keys in ({"segment_ids": True}, {"dtype": "float32"}, {"head_dim": 60}, {"head_dim": 256}):
        assert resolve_backend("auto", platform="gpu", **FITS | keys) == "flash"
    assert resolve_backend("auto", platform="gpu", **FITS | {"dtype": "float64"}) == "xla"
    assert resolve_backend("auto", platform="tpu", **FITS | {"dtype": "float64"}) == "xla"


def test_cudnn_takes_large_heads_from_hopper_on():
    large = FITS | {"platform": "gpu", "head_dim": 256}
    expected = {None: "flash", "8.0": "flash", "9.0": "cudnn", "10.0": "cudnn"}
    assert {each: resolve_backend("auto", capability=each, **large) for each in expected} == expected
    with pytest.raises(ConfigError, match="a multiple of 8 up to 128, not 256"):
        resolve_backend("cudnn", capability="8.9", **large)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"), [("gpu", "9.0", "9.0"), ("gpu", "gfx942", None), ("cpu", "", None)]
)
def test_only_gpus_of_nvidia_have_a_compute_capability(platform, capability, expected):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert capability_of(device) == expected


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("cudnn", {"platform": "cpu"}, "platform gpu"),
        ("cudnn", {"dtype": jnp.float32}, "model.dtype bfloat16"),
        ("cudnn", {"segment_ids": True}, "segment ids"),
        ("cudnn", {"head_dim": 60}, "model.head_dim a multiple of 8"),
        ("splash", {"platform": "gpu"}, "platform tpu"),
        ("splash", {"platform": "tpu", "dtype": "float64"}, "not float64"),
        ("flash", {"platform": "tpu"}, "platform gpu"),
        ("flash", {"head_dim": 257}, "up to 256"),
        ("splsh", {}, "did you mean 'splash'"),
    ],
)
def test_a_named_backend_that_cannot_do_it_says_why_in_one_line(name, keys, says):
    with pytest.raises(ConfigError, match=f"^model.attention={name}: .*{says}") as error:
        resolve_backend(name, **{"platform": "gpu"} | FITS | keys)
    assert "\n" not in str(error.value)


def test_attention_refuses_what_the_named_backend_cannot_do():
    query, key, value, _ = draw(1, 8, 2, 2, 8)
    with pytest.raises(ConfigError, match=r"model\.attention=cudnn: .*not float32"):
        softmax_attention(query, key, value, backend="cudnn")


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize(("batch", "seq", "heads", "kv_heads"), [(4, 130, 4, 1), (1, 5, 3, 1)])
def test_splash_equals_xla_where_no_core_holds_a_head(monkeypatch, shape, batch, seq, heads, kv_heads):
    monkeypatch.setattr(attention_splash, "fits", lambda **_: False)
    interpreted = functools.partial(attention_splash.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention_splash.splash, "make_splash_mha", interpreted)
    inputs, segment_ids = draw(batch, seq, heads, kv_heads, 8), documents(batch, seq)
    ours = functools.partial(softmax_attention, segment_ids=segment_ids, rules=ScoreRules(scale=0.9))
    expected = context_and_gradients(ours, *inputs)
    attention = functools.partial(ours, backend="splash")
    if shape is None:
        got = context_and_gradients(attention, *inputs)
    else:
        with use_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)):
            got = context_and_gradients(attention, *inputs)
    assert_equal_to(expected, got, 5e-6)


# ---- The TPU compiler works without a TPU.


def compile_gradient(backend, mesh, devices, query, kv_heads, segmented):
    """The gradient's executable for a query of this shape, in bfloat16."""
    batch, seq, heads, head_dim = query
    if mesh is None:
        place = ids = jax.sharding.SingleDeviceSharding(devices[0])
    else:
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
        ids = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def shape(heads):
        return jax.ShapeDtypeStruct((batch, seq, heads, head_dim), jnp.bfloat16, sharding=place)

    segment_ids = jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=ids) if segmented else None

    def loss(query, key, value, segment_ids):
        context = softmax_attention(query, key, value, segment_ids=segment_ids, backend=backend)
        return context.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return gradient.lower(shape(heads), shape(kv_heads), shape(kv_heads), segment_ids).compile()


@pytest.mark.parametrize(("head_dim", "segmented"), [(64, False), (128, True)])
@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_splash_compiles_for_tpu(tpu_devices, monkeypatch, held, on_mesh, head_dim, segmented):
    monkeypatch.setattr(attention_splash, "fits", lambda **_: held)
    arguments = (tpu_devices, (8, 512, 8, head_dim), 2, segmented)
    if on_mesh:
        mesh = Mesh(np.reshape(tpu_devices, (2, 2, 2)), AXES, axis_types=(AxisType.Auto,) * 3)
        with use_mesh(mesh):
            text = compile_gradient("splash", mesh, *arguments).as_text()
    else:
        text = compile_gradient("splash", None, *arguments).as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    assert kernels == (2 if held else 3)  # context and gradients; or context, d_query, and d_key with d_value
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]


def test_xla_holds_the_scores_of_few_blocks_at_once_on_tpu(tpu_devices):
    compiled = compile_gradient("xla", None, tpu_devices, (8, 1024, 16, 64), 16, False)
    all_scores = 8 * 16 * 1024 * 1024 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 4
