"""Scores of validation sets."""

import json
import math

import jax.numpy as jnp
import pytest

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.evaluation.perplexity import Score, evaluate, table
from hybridnorm_jax.model.loss import LossSums


def _sums(nll, weight):
    return LossSums(nll=jnp.float32(nll), z=jnp.float32(0), weight=jnp.float32(weight))


def test_a_score_weighs_tokens_and_not_batches():
    sums = [_sums(nll=30, weight=10), _sums(nll=1, weight=1), _sums(nll=0, weight=0)]
    score = evaluate(lambda batch: sums[batch], [0, 1, 2], bytes_per_token=2.0, words_per_token=0.5)
    assert score.loss == pytest.approx(31 / 11)
    assert score.perplexity == pytest.approx(math.exp(31 / 11))
    assert score.bits_per_byte == pytest.approx(31 / 11 / math.log(2) / 2)
    # 11 tokens are 5.5 words.
    assert score.word_perplexity == pytest.approx(math.exp(31 / 5.5))
    assert score.tokens == 11
    assert evaluate(lambda batch: sums[batch], [0]).bits_per_byte is None
    assert evaluate(lambda batch: sums[batch], [0]).word_perplexity is None
    with pytest.raises(UserError, match="no target has a weight"):
        evaluate(lambda batch: sums[batch], [2])


def test_the_table_shows_every_set():
    text = table({"validation": Score(1.5, math.exp(1.5), None, 1000), "c4": Score(2.0, math.exp(2), 1.0, 5)})
    assert [line.split()[0] for line in text.splitlines()] == ["set", "validation", "c4"]
    assert "1,000" in text
    assert "4.482" in text


def test_json_has_null_for_what_is_not_finite():
    score = Score(loss=float("nan"), perplexity=float("inf"), bits_per_byte=None, tokens=3)
    assert score.as_json() == {
        "loss": None,
        "perplexity": None,
        "bits_per_byte": None,
        "tokens": 3,
        "word_perplexity": None,
    }
    json.dumps(score.as_json(), allow_nan=False)
