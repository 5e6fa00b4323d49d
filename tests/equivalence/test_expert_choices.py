"""What two routings of the same tokens differ in: choices, whom they reach, and which of them are ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.equivalence.expert_choices import Routing, compare_routing


def _routing(scores, k=1):
    """A routing of (layers, batch, seq, experts) scores that choose by themselves."""
    scores = jnp.asarray(scores, jnp.float32)
    chosen = (jax.lax.top_k(scores, k)[1][..., None] == jnp.arange(scores.shape[-1])).any(-2)
    return Routing(scores, jax.nn.softmax(scores), chosen)


def test_a_choice_reaches_its_own_token_and_in_the_layers_behind_all_later_ones_of_its_document():
    scores = np.tile(np.array([2.0, 1.0, 0.0]), (3, 1, 6, 1))
    other = scores.copy()
    other[1, 0, 2] = scores[1, 0, 2, [1, 0, 2]]
    for segment_ids, last in ((None, [0, 0, 1, 1, 1, 1]), ([[0, 0, 1, 1, 1, 2]], [0, 0, 1, 1, 1, 0])):
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        found = compare_routing(_routing(other), _routing(scores), segment_ids)
        np.testing.assert_array_equal(found.chosen[:, 0], [[0] * 6, [0, 0, 1, 0, 0, 0], [0] * 6])
        expected = [[0] * 6, [0] * 6, [0, 0, 1, 0, 0, 0], last]
        np.testing.assert_array_equal(found.left_out[:, 0], expected)


def test_the_order_of_choices_is_no_difference():
    scores = np.tile(np.array([2.0, 1.9999, 0.0]), (1, 1, 4, 1))
    found = compare_routing(_routing(scores[..., [1, 0, 2]], 2), _routing(scores, 2))
    assert not found.chosen.any()
    assert not found.left_out.any()
    assert float(found.ties[0]) == 0
    assert 0 < float(found.routers[0]) < 1e-4


def test_only_what_no_earlier_choice_has_reached_must_agree():
    """The second layer's router may say anything of tokens that a tie in the first has reached, of no others."""
    scores = np.tile(np.array([2.0, 1.9999, 0.0]), (2, 1, 4, 1))
    other = scores.copy()
    other[0, 0, 2] = scores[0, 0, 2, [1, 0, 2]]
    other[1, 0, 3] = [0.0, 1.0, 2.0]
    found = compare_routing(_routing(other), _routing(scores))
    assert 0 < float(found.routers[0]) < 1e-4
    assert 0 < float(found.ties[0]) < 1e-4
    assert float(found.routers[1]) == float(found.ties[1]) == 0
    other[1, 0, 1] = [0.0, 1.0, 2.0]
    found = compare_routing(_routing(other), _routing(scores))
    assert float(found.routers[1]) == pytest.approx(1.0)
    # (p_0 - p_2) / (max |logit| * max p) = (1 - exp(-2)) / 2
    assert float(found.ties[1]) == pytest.approx((1 - np.exp(-2)) / 2, rel=1e-5)


def test_nan_is_no_tie():
    scores = np.tile(np.array([2.0, 1.0, 0.0]), (1, 1, 3, 1))
    other = scores.copy()
    other[0, 0, 1] = np.nan
    assert np.isnan(compare_routing(_routing(other), _routing(scores)).routers[0])
    assert np.isnan(compare_routing(_routing(scores), _routing(other)).routers[0])
