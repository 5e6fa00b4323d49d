"""What attention makes of its scores (scale, cap, windows, sinks, ALiBi, no causal mask) against NumPy, in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from covering import diagonal, others_are_long
from test_attention_backends import FITS, documents, draw

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels import split_sequence
from hybridnorm_jax.kernels.attention_backends import resolve_backend, softmax_attention
from hybridnorm_jax.kernels.backend_names import FEATURES
from hybridnorm_jax.kernels.blockwise_attention import attention_statistics
from hybridnorm_jax.kernels.cached_attention import attend_at_once, attend_in_blocks
from hybridnorm_jax.kernels.score_rules import Alibi, ScoreRules
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh

HEADS = 4
SINKS = np.array([0.5, -1.0, 2.0, 8.0])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": {},
    "scale": {"scale": 0.7},
    "cap": {"scale": 0.7, "cap": 1.5},
    "bidirectional": {"causal": False},
    "window": {"window": 33},
    "window_of_one": {"window": 1},
    "window_longer_than_the_text": {"window": 10_000},
    "layer_window": {"layer_window": 33},
    "bidirectional_window": {"causal": False, "window": 70},
    "bidirectional_layer_window": {"causal": False, "layer_window": 70},
    "sinks": {"sinks": SINKS},
    "alibi": {"slopes": SLOPES},
    "bidirectional_alibi": {"causal": False, "slopes": SLOPES},
    "alibi_bfloat16": {"slopes": SLOPES, "alibi_scale": 0.3, "alibi_bfloat16": True},
    "all": {"scale": 0.4, "cap": 2.0, "window": 90, "sinks": SINKS, "slopes": SLOPES, "alibi_scale": 0.5},
    "all_bidirectional": {"cap": 2.0, "causal": False, "layer_window": 90, "sinks": SINKS, "slopes": SLOPES},
}


def positions_in(segment_ids, batch, seq):
    """The place of each token in its document."""
    if segment_ids is None:
        return np.tile(np.arange(seq), (1, 1))
    ids = np.asarray(segment_ids)
    return np.array([[i - row.tolist().index(row[i]) for i in range(seq)] for row in ids])


def rules_of(keys, segment_ids=None, batch=1, seq=1):
    """The ScoreRules of one of RULES."""
    given = {name: value for name, value in keys.items() if name in ("scale", "cap", "causal", "window")}
    if "layer_window" in keys:
        given["layer_window"] = jnp.asarray(keys["layer_window"])
    if "sinks" in keys:
        given["sinks"] = jnp.asarray(keys["sinks"])
    if "slopes" in keys:
        positions = positions_in(segment_ids, batch, seq) if keys.get("alibi_bfloat16") else None
        given["alibi"] = Alibi(
            slopes=jnp.asarray(keys["slopes"]),
            scale=keys.get("alibi_scale", 1.0),
            key_positions=None if positions is None else jnp.asarray(positions),
        )
    return ScoreRules(**given)


def dense(query, key, value, sinks, keys, segment_ids=None, library=jnp):
    """The weights and the context with one loop over heads and the whole matrix of scores.

    Args:
      library: jnp, for the gradient; np compiles nothing.
    """
    batch, seq, heads, head_dim = query.shape
    group = heads // key.shape[2]
    q_place, k_place = np.arange(seq)[:, None], np.arange(seq)[None]
    sees = np.ones((batch, seq, seq), bool)
    if keys.get("causal", True):
        sees &= k_place <= q_place
    window = keys.get("window", keys.get("layer_window"))
    if window is not None:
        sees &= np.abs(q_place - k_place) < window
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        sees &= ids[:, :, None] == ids[:, None, :]
    weights, contexts = [], []
    for head in range(heads):
        scores = library.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head // group])
        scores = scores * keys.get("scale", 1 / math.sqrt(head_dim))
        if "cap" in keys:
            scores = keys["cap"] * library.tanh(scores / keys["cap"])
        if "slopes" in keys:
            slope, factor = keys["slopes"][head], keys.get("alibi_scale", 1.0)
            if keys.get("alibi_bfloat16"):
                place = positions_in(segment_ids, batch, seq).astype(ml_dtypes.bfloat16)
                added = np.asarray(slope, ml_dtypes.bfloat16) * place
                scores = scores + factor * added.astype(np.float64)[:, None]
            else:
                scores = scores + factor * slope * (k_place - q_place)
        powers = library.where(sees, library.exp(scores), 0)
        total = powers.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + library.exp(sinks[head])
        weights.append(powers / total)
        contexts.append(library.einsum("bqk,bkd->bqd", powers / total, value[:, :, head // group]))
    return library.stack(weights, axis=1), library.stack(contexts, axis=2)


def both(function, inputs, sinks, d_context):
    """The context and the gradients of query, key, value and, where there are any, sinks."""

    @jax.jit
    def run(inputs, sinks):
        context, pull = jax.vjp(function, *inputs, sinks)
        return context, *pull(d_context)

    return [array for array in run(inputs, sinks) if array is not None]


def compare(name, *, seq, kv_heads, segmented, mesh=None):
    keys = RULES[name]
    segment_ids = documents(2, seq) if segmented else None
    with jax.enable_x64(True):
        *inputs, d_context = draw(2, seq, HEADS, kv_heads, 8, np.float64)
        rules, sinks = rules_of(keys, segment_ids, 2, seq), None
        if "sinks" in keys:
            sinks = jnp.asarray(keys["sinks"])

        def ours(query, key, value, sinks):
            here = dataclasses.replace(rules, sinks=sinks)
            return softmax_attention(query, key, value, segment_ids=segment_ids, rules=here)

        expected = both(lambda *a: dense(*a, keys, segment_ids)[1], inputs, sinks, d_context)
        if mesh is None:
            got = both(ours, inputs, sinks, d_context)
        else:
            with use_mesh(mesh):
                got = both(ours, inputs, sinks, d_context)
    assert len(expected) == len(got) == (4 if sinks is None else 5)
    for right, array in zip(expected, got, strict=True):
        np.testing.assert_allclose(array, right, rtol=0, atol=1e-12 * max(1, np.abs(right).max()))


@pytest.mark.parametrize("name", RULES)
def test_xla_computes_what_the_rules_say_with_its_gradients(name):
    """Of documents, with two heads to one of keys, in several blocks."""
    compare(name, seq=200, kv_heads=2, segmented=True)


@pytest.mark.parametrize("name", others_are_long(RULES, ["all", "all_bidirectional"]))
@pytest.mark.parametrize(("seq", "kv_heads"), [(7, 4), (300, 1)])
def test_xla_computes_it_for_other_lengths_and_heads(name, seq, kv_heads):
    compare(name, seq=seq, kv_heads=kv_heads, segmented=False)


SHARED = [({"context": 2, "tensor": 4}, 2, True), ({"context": 4}, 4, False), ({"data": 2, "tensor": 2}, 4, True)]


@pytest.mark.parametrize(("name", "shared"), diagonal(RULES, SHARED, apart=3))
def test_it_is_the_same_where_devices_share_sequences_and_heads(name, shared, monkeypatch):
    sizes, kv_heads, segmented = shared
    monkeypatch.setattr(split_sequence, "BLOCK", 8)  # several blocks of keys to each half
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    compare(name, seq=192, kv_heads=kv_heads, segmented=segmented, mesh=mesh)


def test_a_window_spares_devices_that_share_a_sequence_most_blocks(monkeypatch):
    monkeypatch.setattr(split_sequence, "BLOCK", 8)
    query, key, value, _ = draw(1, 256, 2, 2, 8)

    def trips(rules):
        with use_mesh(make_mesh({"context": 4}, jax.devices()[:4])):
            text = str(jax.make_jaxpr(functools.partial(softmax_attention, rules=rules))(query, key, value))
        (length,) = {word for word in text.split() if word.startswith("length=")}
        return int(length.removeprefix("length=").rstrip("]"))

    assert trips(ScoreRules()) == 9 * 4
    assert trips(ScoreRules(window=9)) == 2 * 6  # 40 keys, which may begin within a block


def test_a_static_window_leaves_out_blocks_that_nobody_sees():
    query, key, value, _ = draw(1, 512, 2, 2, 8)

    def products(rules):
        gradient = jax.grad(lambda *qkv: softmax_attention(*qkv, rules=rules).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(query, key, value).compile().cost_analysis()["flops"]

    assert products(ScoreRules(window=64)) < 0.75 * products(ScoreRules())


@pytest.mark.parametrize(
    ("name", "blocks"), diagonal([name for name in RULES if RULES[name].get("causal", True)], [None, 3, 8], apart=3)
)
def test_a_new_token_sees_kept_ones_by_the_same_rules(name, blocks):
    keys, (batch, slots, kv_heads, width) = RULES[name], (3, 61, 2, 8)
    attend = attend_at_once if blocks is None else functools.partial(attend_in_blocks, blocks=blocks)
    with jax.enable_x64(True):
        query, key, value, _ = map(np.asarray, draw(batch, slots, HEADS, kv_heads, width, np.float64))
        rules = rules_of(keys, None, batch, slots)
        compiled = jax.jit(attend)
        for first, last in [([0, 0, 0], 0), ([0, 7, 30], 45), ([13, 5, 60], 60)]:
            got = compiled(
                query[:, last : last + 1],
                np.moveaxis(key, 1, 3),
                np.moveaxis(value, 1, 3),
                jnp.asarray(first),
                jnp.asarray(last),
                rules,
            )
            for row, start in enumerate(first):
                part = [x[row : row + 1, start : last + 1] for x in (query, key, value)]
                _, context = dense(*part, keys.get("sinks"), keys, library=np)
                np.testing.assert_allclose(got[row, 0], context[0, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_statistics_are_those_of_the_weights_written_out(name):
    keys, seq = RULES[name], 150
    segment_ids = documents(2, seq)
    with jax.enable_x64(True):
        query, key, value, _ = map(np.asarray, draw(2, seq, HEADS, 2, 8, np.float64))
        rules = rules_of(keys, segment_ids, 2, seq)
        got = jax.jit(attention_statistics)(query, key, segment_ids, rules)
        weights = dense(query, key, value, keys.get("sinks"), keys, segment_ids, library=np)[0]
    rest = 1 - weights.sum(-1, keepdims=True) if "sinks" in keys else np.zeros((2, HEADS, seq, 0))
    weights = np.concatenate([weights, rest], axis=-1)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean()
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-10, atol=1e-15)  # of one key it is 0


def test_narrow_dtypes_take_sinks_and_caps_in_float32():
    inputs = draw(2, 200, HEADS, 2, 16, jnp.bfloat16)
    rules = rules_of(RULES["all"])
    rules = ScoreRules(scale=rules.scale, cap=rules.cap, window=rules.window, sinks=rules.sinks, alibi=rules.alibi)
    wide = [np.asarray(x, np.float64) for x in inputs]
    right = dense(*wide[:3], SINKS, RULES["all"], library=np)[1]
    got = jax.jit(functools.partial(softmax_attention, rules=rules))(*inputs[:3])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), right, atol=2e-2)


# ---- Who can do it.

ASKED = {
    "bidirectional": ScoreRules(causal=False),
    "windows": ScoreRules(window=4),
    "score_cap": ScoreRules(cap=4.0),
    "sinks": ScoreRules(sinks=SINKS),
    "alibi": ScoreRules(alibi=Alibi(SLOPES)),
}


def test_every_feature_is_asked_for_by_its_rule():
    assert ScoreRules(scale=3.0).features == ()
    assert {name: (name,) for name in FEATURES} == {name: rules.features for name, rules in ASKED.items()}
    assert ScoreRules(layer_window=jnp.asarray(3)).features == ("windows",)


@pytest.mark.parametrize(("feature", "backend"), list(itertools.product(ASKED, ("cudnn", "flash", "splash"))))
def test_a_fused_kernel_refuses_what_it_cannot_do_and_auto_takes_another(feature, backend):
    platform, features = "tpu" if backend == "splash" else "gpu", ASKED[feature].features
    has_it = (feature, backend) == ("bidirectional", "cudnn")
    assert resolve_backend("auto", platform=platform, features=features, **FITS) == (
        "cudnn" if platform == "gpu" and feature == "bidirectional" else "xla"
    )
    if has_it:
        assert resolve_backend(backend, platform=platform, features=features, **FITS) == backend
        return
    with pytest.raises(ConfigError, match=f"^model.attention={backend}: ") as error:
        resolve_backend(backend, platform=platform, features=features, **FITS)
    assert FEATURES[feature] in str(error.value)
    assert "\n" not in str(error.value)


def test_attention_itself_refuses_it_too():
    query, key, value, _ = draw(1, 8, HEADS, 2, 8, jnp.bfloat16)
    # What hides nothing is no window.
    jax.eval_shape(lambda *x: softmax_attention(*x, rules=ScoreRules(window=8), backend="splash"), query, key, value)
    with pytest.raises(ConfigError, match=r"model\.attention=splash: .*model\.windows"):
        softmax_attention(query, key, value, rules=ScoreRules(window=4), backend="splash")
