"""Scores of continuations are those of the model's own logits, whatever else is scored beside them and on any mesh."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.data import Windows
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.evaluation import token_scores
from hybridnorm_jax.evaluation.perplexity import evaluate_sets
from hybridnorm_jax.evaluation.token_requests import Request
from hybridnorm_jax.evaluation.token_scores import TokenScorer
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.shardings import tree_shardings
from hybridnorm_jax.training.step import make_eval_step

WINDOW, VOCAB = 64, 61
# In each of the six levels in which a row of 64 log-probabilities is added up, float32 rounds to 2^-24 of the sum. The
# layers have rounded what is added, too: 2^-20 leaves twice that. Measured: 2^-23 (8e-5 of 741 nats).
RELATIVE, ABSOLUTE = 2**-20, 2e-5


@pytest.fixture(scope="module")
def config():
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": VOCAB}
    return hn.ModelConfig(scheme="hybrid_star", attention="xla", **sizes)


@pytest.fixture(scope="module")
def params(config):
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    # Fresh logits are nearly alike; a larger head tells tokens apart.
    return params | {"head": {"kernel": 2 * params["head"]["kernel"]}}


def _requests():
    rng = np.random.default_rng(0)

    def tokens(count):
        return rng.integers(0, VOCAB, count).tolist()

    lengths = [(3, 2), (1, 1), (20, 9), (40, 9), (60, 30), (1, 64), (1, 65), (7, 150), (100, 20), (30, 0)]
    return [Request(tokens(context), tokens(continuation)) for context, continuation in lengths]


@partial(jax.jit, static_argnames="config")
def _logits(config, params, row):
    return hn.Decoder(config).apply({"params": params}, row[None])[0]


def _logits_after(config, params, tokens):
    """Of every one of at most WINDOW tokens."""
    row = np.zeros(WINDOW, np.int32)
    row[: len(tokens)] = tokens
    return np.asarray(_logits(config, params, row), np.float64)[: len(tokens)]


def _expected(config, params, request, stride=WINDOW):
    """Token by token, each after a window of its own: the positions of pieces are chosen once more, in other words."""
    context, continuation = list(request.context), list(request.continuation)
    everything, total, greedy = context + continuation, 0.0, True
    for number, token in enumerate(continuation):
        if number < WINDOW:
            last = min(WINDOW, len(continuation))
        else:
            last = min(WINDOW + ((number - WINDOW) // stride + 1) * stride, len(continuation))
        read = everything[: len(context) + last - 1][-WINDOW:]
        place = len(read) - (last - number)
        logits = _logits_after(config, params, read)[place]
        total += logits[token] - np.log(np.exp(logits).sum())
        greedy &= bool(logits.argmax() == token)
    return total, greedy


def _greedy_request(config, params, context, count):
    tokens = list(context)
    for _ in range(count):
        tokens.append(int(_logits_after(config, params, tokens)[-1].argmax()))
    return Request(tokens[: len(context)], tokens[len(context) :])


def _scorer(config, mesh, **options):
    return TokenScorer(hn.Decoder(config), mesh, **({"window": WINDOW, "batch_size": 8} | options))


def _one_device():
    return make_mesh({}, jax.devices()[:1])


@pytest.mark.parametrize("stride", [None, 20])
def test_scores_are_the_sums_of_the_models_own_log_probabilities(config, params, stride):
    requests = _requests()
    scores = _scorer(config, _one_device()).score(params, requests, stride=stride)
    for request, score in zip(requests, scores, strict=True):
        likelihood, is_greedy = _expected(config, params, request, stride or WINDOW)
        assert score.log_likelihood == pytest.approx(likelihood, rel=RELATIVE, abs=ABSOLUTE)
        assert score.is_greedy == is_greedy
    assert scores[-1] == (0.0, True)  # nothing has probability 1


def test_greedy_means_that_every_token_is_the_likeliest(config, params):
    request = _greedy_request(config, params, [5, 6, 7], 4)
    *begun, last = request.continuation
    other = Request(request.context, [*begun, (last + 1) % VOCAB])
    first = Request(request.context, [(begun[0] + 1) % VOCAB, *request.continuation[1:]])
    scores = _scorer(config, _one_device()).score(params, [request, other, first])
    assert [score.is_greedy for score in scores] == [True, False, False]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.long),
        {"data": 2, "tensor": 2, "context": 2},
        pytest.param({"tensor": 2, "fsdp": 4}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_mesh_gives_the_same(config, params, sizes):
    requests = _requests()
    alone = _scorer(config, _one_device()).score(params, requests)
    mesh = make_mesh(sizes)
    placed = jax.device_put(params, tree_shardings(params, mesh))
    scores = _scorer(config, mesh, batch_size=16).score(placed, requests)
    np.testing.assert_allclose(
        [score.log_likelihood for score in scores], [score.log_likelihood for score in alone], RELATIVE, ABSOLUTE
    )
    assert [score.is_greedy for score in scores] == [score.is_greedy for score in alone]


def test_a_length_is_one_program_however_many_requests_there_are(config, params):
    scorer = _scorer(config, _one_device(), batch_size=2)
    many = [Request([1] * length, [2, 3]) for length in (2, 3, 9, 20, 31) * 9]
    scorer.score(params, many)
    assert scorer.programs == 1  # all are at most 32 tokens long
    scorer.score(params, many[:1])
    assert scorer.programs == 1
    scorer.score(params, [*many, Request([1] * 40, [2]), Request([1] * 63, [2]), Request([1] * 500, [2])])
    assert scorer.programs == 2


def test_a_few_positions_logits_at_a_time_give_the_same(config, params, monkeypatch):
    requests = _requests()
    whole = _scorer(config, _one_device()).score(params, requests)
    monkeypatch.setattr(token_scores, "MOST_LOGITS", 32 * VOCAB * 4)
    scorer = _scorer(config, _one_device())
    chunked = scorer.score(params, requests)
    np.testing.assert_allclose(
        [score.log_likelihood for score in chunked], [score.log_likelihood for score in whole], RELATIVE, ABSOLUTE
    )
    assert [score.is_greedy for score in chunked] == [score.is_greedy for score in whole]


@pytest.mark.parametrize("stride", [WINDOW, 24, 8])
def test_a_validation_set_with_a_stride_is_scored_as_one_long_text(config, params, stride):
    tokens = np.random.default_rng(3).integers(0, VOCAB, 1 + WINDOW + 3 * stride)
    stream = TokenStream((Extent(tokens, "memory", 0, len(tokens)),), VOCAB)
    step = jax.jit(make_eval_step(hn.Decoder(config)))
    (score,) = evaluate_sets(
        lambda batch: step(params, batch),
        {"set": Windows(stream, seq_len=WINDOW, tail=True)},
        batch_size=2,
        stride=stride,
        progress=False,
    ).values()
    request = Request(tokens[:1].tolist(), tokens[1:].tolist())
    (expected,) = _scorer(config, _one_device()).score(params, [request], stride=stride)
    assert score.tokens == len(tokens) - 1
    assert score.loss == pytest.approx(-expected.log_likelihood / score.tokens, rel=1e-6)


def test_a_token_that_the_model_does_not_have_is_named(config, params):
    with pytest.raises(UserError, match=r"token 61 is outside model.vocab_size=61"):
        _scorer(config, _one_device()).score(params, [Request([1], [61])])


def test_learned_positions_are_not_exceeded_where_lengths_are_rounded_up(config):
    learned = dataclasses.replace(config, positions="learned", max_positions=50)
    params = jax.jit(hn.Decoder(learned).init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    scorer = TokenScorer(hn.Decoder(learned), _one_device(), window=50, batch_size=2)
    (score,) = scorer.score(params, [Request([1] * 60, [2] * 70)])
    assert np.isfinite(score.log_likelihood)


def test_longrope_counts_the_tokens_of_a_row_and_not_what_fills_it_up(config, params):
    """16 tokens are rotated by the short factors, 17 by the long ones, and both stand in a row of another length."""
    keys = {"rope_scaling": "longrope", "rope_original_length": 16, "rope_factor": 4}
    longrope = dataclasses.replace(config, **keys, rope_short_factors=(1,) * 4, rope_long_factors=(2, 3, 4, 5))
    tokens = np.random.default_rng(3).integers(0, VOCAB, 18)
    requests = [Request(tokens[:count].tolist(), tokens[count : count + 1].tolist()) for count in (9, 16, 17)]
    scores = _scorer(longrope, _one_device()).score(params, requests)
    for request, score in zip(requests, scores, strict=True):
        logits = jax.jit(hn.Decoder(longrope).apply)({"params": params}, np.asarray([request.context]))[0, -1]
        expected = jax.nn.log_softmax(logits)[request.continuation[0]]
        np.testing.assert_allclose(score.log_likelihood, expected, rtol=1e-5)
