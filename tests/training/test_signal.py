"""What is measured of signal and gradients is what an unscanned model, written out here, shows by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax.kernels.blockwise_attention import attention_statistics
from hybridnorm_jax.model.signal_measures import gradient_probe, stream_rms, token_similarity
from hybridnorm_jax.training.layer_measures import layer_norms, make_watch, measure_signal
from hybridnorm_jax.training.state import TrainState

EXACT = 1e-10  # relative, in float64: the same sums in another order


def _batch(tokens):
    targets = np.roll(tokens, -1, 1)
    return {"tokens": tokens, "targets": targets, "weights": (np.arange(12) < 11) * np.ones((2, 1))}


def _layers(config, params):
    """[(block, parameters)] of every layer, taken out of the stacks."""
    found = []
    for number, run in enumerate(config.runs):
        for i, layer in enumerate(run.layers):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params[f"run_{number}"])
            found.append((hn.Block(config=config, placement=layer.placement), own))
    return found


def _by_hand(config, params, batch):
    """(streams, gradient of each stream, gradients of each layer's parameters) with a Python loop over the layers."""
    layers = _layers(config, params)
    outer = hn.Decoder(config)

    def forward(weights, nudges):
        stream = jnp.take(params["token_embedding"]["embedding"], batch["tokens"], axis=0)
        if config.has_embedding_norm:
            scale = params["embedding_norm"]["scale"]
            stream = hn.rms_norm(stream, eps=config.norm_eps) * scale
        streams = [stream]
        stream = stream + nudges[0]
        for (block, _), own, nudge in zip(layers, weights, nudges[1:], strict=True):
            stream = block.apply({"params": own}, stream)
            streams.append(stream)
            stream = stream + nudge
        if config.has_final_norm:
            stream = hn.rms_norm(stream, eps=config.norm_eps) * params["final_norm"]["scale"]
        logits = outer.apply({"params": params}, stream, method="logits")
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        return -(picked * batch["weights"]).sum() / batch["weights"].sum(), streams

    nudges = [jnp.zeros((2, 12, config.d_model))] * (config.num_layers + 1)
    weights = [own for _, own in layers]
    gradients = jax.jit(jax.value_and_grad(forward, (0, 1), has_aux=True))
    (_, streams), (by_weights, by_stream) = gradients(weights, nudges)
    return streams, by_stream, by_weights


def _norm(leaves):
    return math.sqrt(sum(float(np.square(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(leaves)))


@pytest.mark.parametrize(
    ("scheme", "remat"),
    [
        ("pre", "none"),
        ("hybrid_star", "full"),
        pytest.param("peri", "none", marks=pytest.mark.long),  # span has norms after branches, too
        ("span", "none"),
    ],
)
def test_measures_are_those_of_an_unscanned_model(scheme, remat, small_config, random_params, tokens):
    with jax.enable_x64(True):
        config = small_config(scheme=scheme, remat=remat, dtype="float64", param_dtype="float64")
        params, batch = random_params(config), _batch(tokens)
        measures, gradient = jax.jit(functools.partial(measure_signal, hn.Decoder(config)))(params, batch)
        streams, by_stream, by_weights = _by_hand(config, params, batch)

        np.testing.assert_allclose(measures["stream_rms"], [np.sqrt(np.mean(s**2)) for s in streams], rtol=EXACT)
        np.testing.assert_allclose(measures["stream_gradient"], list(map(_norm, by_stream)), rtol=EXACT)
        np.testing.assert_allclose(measures["gradient/block"], list(map(_norm, by_weights)), rtol=EXACT)
        for group in ("query", "key", "value", "out"):
            own = [_norm(layer["attention"][group]) for layer in by_weights]
            np.testing.assert_allclose(measures[f"gradient/attention/{group}"], own, rtol=EXACT)
        down = [_norm(layer["feed_forward"]["down"]) for layer in by_weights]
        np.testing.assert_allclose(measures["gradient/feed_forward/down"], down, rtol=EXACT)
        table = gradient["token_embedding"]["embedding"]
        np.testing.assert_allclose(measures["gradient/token_embedding"], _norm(table), rtol=EXACT)
        cosines = [np.mean(_cosines(np.asarray(stream))) for stream in streams]
        np.testing.assert_allclose(measures["token_similarity"], cosines, rtol=EXACT)


def _cosines(stream):
    units = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    positions = stream.shape[1]
    return [
        sequence[i] @ sequence[j] for sequence in units for i in range(positions) for j in range(positions) if i != j
    ]


def test_two_blocks_computed_by_hand(monkeypatch):
    """A stream one number wide and no norm anywhere: what is left is school arithmetic."""
    bare = hn.Scheme("bare", lambda layer, num_layers: hn.BlockPlacement(), final_norm=False)
    monkeypatch.setitem(hn.SCHEMES, "bare", bare)
    a, b, embedding = 3.0, 0.5, 0.1
    with jax.enable_x64(True):
        sizes = {"d_model": 1, "num_layers": 2, "num_heads": 1, "head_dim": 2, "mlp_dim": 1, "vocab_size": 2}
        config = hn.ModelConfig(scheme="bare", activation="relu", dtype="float64", param_dtype="float64", **sizes)
        # Queries and keys are zero, so all visible tokens weigh alike, and they are alike: attention adds a x. Then the
        # feed-forward layer adds b x, since x > 0.
        block = {
            "attention": {
                "query": {"kernel": np.zeros((2, 1, 1, 2))},
                "key": {"kernel": np.zeros((2, 1, 1, 2))},
                "value": {"kernel": np.ones((2, 1, 1, 2))},
                "out": {"kernel": np.full((2, 1, 2, 1), a / 2)},
            },
            "feed_forward": {"up": {"kernel": np.ones((2, 1, 1))}, "down": {"kernel": np.full((2, 1, 1), b)}},
        }
        params = {
            "token_embedding": {"embedding": np.full((2, 1), embedding)},
            "run_0": block,
            "head": {"kernel": np.array([[1.0, 0.0]])},
        }
        batch = {"tokens": np.zeros((1, 3), int), "targets": np.ones((1, 3), int), "weights": np.ones((1, 3))}
        measures, _ = jax.jit(functools.partial(measure_signal, hn.Decoder(config)))(params, batch)

    factor = (1 + a) * (1 + b)
    rms = embedding * factor ** np.arange(3)
    np.testing.assert_allclose(measures["stream_rms"], rms)
    np.testing.assert_allclose(measures["token_similarity"], [1, 1, 1])
    # Queries see 1, 2 and 3 keys, all with the logit 0.
    np.testing.assert_allclose(measures["attention_entropy"], [(math.log(2) + math.log(3)) / 3] * 2)
    np.testing.assert_allclose(measures["largest_logit"], [0, 0])
    # The loss log(1 + exp(x)) of each token has the slope sigmoid(x); tokens take from themselves and from before.
    slope = 1 / (1 + math.exp(-rms[-1]))
    back = (1 + b) * (np.eye(3) + a * np.array([[1, 1 / 2, 1 / 3], [0, 1 / 2, 1 / 3], [0, 0, 1 / 3]]))
    gradients = [np.full(3, slope / 3)]
    for _ in range(2):
        gradients.insert(0, back @ gradients[0])
    np.testing.assert_allclose(measures["stream_gradient"], [np.linalg.norm(g) for g in gradients])
    # The last block's down kernel multiplies x after attention, the same in all tokens.
    np.testing.assert_allclose(measures["gradient/feed_forward/down"][1], slope * rms[1] * (1 + a))


def test_attention_statistics_are_those_of_the_weights_written_out():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k = rng.normal(size=(2, 70, 4, 6)), rng.normal(size=(2, 70, 2, 6))  # 70: more than one block of queries
        segments = np.sort(rng.integers(0, 3, (2, 70)), 1)
        for ids in (None, segments):
            entropy, largest = attention_statistics(
                jnp.asarray(q), jnp.asarray(k), None if ids is None else jnp.asarray(ids)
            )
            entropies, logits = [], []
            for batch in range(2):
                for head in range(4):
                    for row in range(70):
                        keys = [j for j in range(row + 1) if ids is None or ids[batch, j] == ids[batch, row]]
                        z = k[batch, keys, head // 2] @ q[batch, row, head] / math.sqrt(6)
                        p = np.exp(z) / np.exp(z).sum()
                        entropies.append(-(p * np.log(p)).sum())
                        logits.append(z.max())
            np.testing.assert_allclose(entropy, np.mean(entropies), rtol=EXACT)
            np.testing.assert_allclose(largest, max(logits), rtol=EXACT)


def test_logits_are_those_after_the_norms(small_config, random_params, tokens):
    config = small_config(scheme="hybrid", num_layers=1)
    params = random_params(config)
    measure = jax.jit(functools.partial(measure_signal, hn.Decoder(config)))
    before, _ = measure(params, _batch(tokens))
    norm = params["run_0"]["attention"]["q_norm"]
    norm["scale"] = 3 * norm["scale"]
    after, _ = measure(params, _batch(tokens))
    np.testing.assert_allclose(after["largest_logit"], 3 * before["largest_logit"], rtol=1e-5)


def test_the_probe_passes_value_and_gradient_and_squares_the_gradient():
    x, weights = jnp.arange(3.0), jnp.array([2.0, -1.0, 3.0])
    value, (by_x, square) = jax.value_and_grad(lambda x, s: weights @ gradient_probe(x, s), (0, 1))(x, jnp.zeros(()))
    np.testing.assert_array_equal(by_x, weights)
    assert value == 5
    assert square == 14


def test_similarity_of_known_tokens():
    stream = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    np.testing.assert_allclose(token_similarity(stream), 1 / 3)  # of three pairs one is parallel, two are orthogonal
    np.testing.assert_allclose(stream_rms(stream), math.sqrt(14 / 6), rtol=1e-6)
    assert np.isnan(token_similarity(stream[:, :1]))


def test_a_group_that_a_layer_lacks_is_nan_there(small_config, random_params):
    params = random_params(small_config(scheme="hybrid_star"))
    norms = layer_norms(params)
    assert np.isnan(norms["attention_post_norm"]).tolist() == [True, False, False]
    assert np.isnan(norms["attention_pre_norm"]).tolist() == [False, True, True]
    both = [params["run_0"], jax.tree.map(lambda leaf: leaf[:1], params["run_1"])]
    np.testing.assert_allclose(norms["block"][:2], list(map(_norm, both)), rtol=1e-5)
    single = {name.rpartition("/")[2] for name, value in norms.items() if np.ndim(value) == 0}
    assert single == {"token_embedding", "final_norm", "head"}


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "shared_experts": 1}


@pytest.mark.parametrize("keys", [{}, pytest.param(EXPERTS, marks=pytest.mark.long)])
def test_watch_takes_sequences_of_every_share_and_the_optimizers_own_update(keys, small_config, random_params):
    config = small_config(scheme="pre", **keys)
    model, params, optimizer = hn.Decoder(config), random_params(config), optax.adamw(1e-2)
    state = TrainState(jnp.zeros((), int), params, optimizer.init(params), None)
    tokens = np.random.default_rng(2).integers(0, 61, (2, 6, 12))  # microbatches, sequences, positions
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
    watch = jax.jit(make_watch(model, lambda numbers: optimizer, shares=2, sequences=2))
    found = watch(state, batch, None)
    some = jax.tree.map(lambda leaf: leaf[0][np.array([0, 1, 3, 4])], batch)
    measures, gradient = jax.jit(functools.partial(measure_signal, model))(params, some)
    updates = layer_norms(jax.jit(optimizer.update)(gradient, state.opt_state, params)[0])
    for name, value in measures.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
    for name, value in updates.items():
        np.testing.assert_allclose(found[f"update/{name}"], value, rtol=1e-4, err_msg=name)
    assert set(flatten_dict(found)) >= {(f"parameter/{name}",) for name in updates}
