"""Encoders convert like decoders: every output stays, up to rounding, and what remains to be centred is named."""

import jax
import numpy as np
import pytest
from covering import diagonal, others_are_long
from model.test_encoder import MODELS, PRE_LN, apply, encoder_config, inputs_of, random_params

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import conversion_of
from hybridnorm_jax.equivalence.encoder_forms import EMBEDDING_CENTRING, POOLING_CENTRING
from hybridnorm_jax.equivalence.expert_choices import Routing, compare_routing
from hybridnorm_jax.equivalence.forward_pass import compared, forward
from hybridnorm_jax.model.norm_functions import zero_mean_defect

forward_pass = jax.jit(forward, static_argnums=0)
WIDE = {"dtype": "float64", "param_dtype": "float64"}
HEADS = {"two heads": {"num_classes": 5, "distillation_token": True, "distillation_head": True}}
MORE = {
    "no q, k, v bias": {"attention_bias": False, "attention_output_bias": True},
    "layer scale": {"layer_scale": True},
    "scales from zero": {"norm_scale_plus_one": True, "attention_norm_scale": False},
    "centred already": {"embedding_centring": True},
    "experts": {"num_experts": 3, "experts_per_token": 2, "activation": "swiglu"},
}
CHANGES = {"layer scale": ("layer scale is part of the branches' last projections",)}
FORMS = [("pre_rmsnorm", 1), ("pre_crmsnorm", 1), ("pre_crmsnorm", 12)]
CENTRINGS = {"clip": (EMBEDDING_CENTRING,), "siglip": (POOLING_CENTRING,)}


@pytest.mark.parametrize(("name", "target"), diagonal(MODELS | HEADS | MORE, FORMS, apart=3))
def test_every_output_stays(name, target):
    form, pad_to = target
    with jax.enable_x64(True):
        config = encoder_config(**{**PRE_LN, **(MODELS | HEADS | MORE)[name]}, **WIDE)
        params, inputs = random_params(config), inputs_of(config)
        conversion = conversion_of(config, form, pad_to=pad_to)
        assert conversion.config.norm == form.removeprefix("pre_")
        assert conversion.centrings == CENTRINGS.get(name, ())
        assert conversion.changes == CHANGES.get(name, ())
        expected = apply(config, params, inputs)
        found = apply(conversion.config, conversion.convert(params), inputs)
        if config.norm_pooled_only:  # the last hidden state is the stream, which has no mean any more
            expected, found = expected.pooled, found.pooled
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


# The three whose streams begin or end otherwise.
@pytest.mark.parametrize("name", others_are_long(MODELS, ["vit", "siglip", "clip_text"]))
def test_the_stream_has_no_mean(name):
    with jax.enable_x64(True):
        config = encoder_config(**PRE_LN, **MODELS[name], **WIDE)
        params, inputs = random_params(config), inputs_of(config)
        conversion = conversion_of(config, "pre_rmsnorm")
        before = forward_pass(config, params, inputs).stream
        after = forward_pass(conversion.config, conversion.convert(params), inputs).stream
        assert float(zero_mean_defect(before)) > 1e-2
        assert float(zero_mean_defect(after)) < 1e-12


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit", "last hidden state and what is pooled"),
        ("dinov2", "last hidden state and what is pooled"),
        ("siglip", "last hidden state and what is pooled"),
        ("no pooling", "last hidden state"),
        ("clip", "what is pooled"),
        ("two heads", "logits"),
    ],
)
def test_all_that_a_conversion_keeps_is_compared(name, words):
    """Names and numbers: the last hidden state too, except where it is the stream, which loses its mean."""
    config = encoder_config(**PRE_LN, **(MODELS | HEADS | {"no pooling": {"pooling": "none"}})[name])
    params, inputs = random_params(config), inputs_of(config)
    given = apply(config, params, inputs)
    parts = [given] if words == "logits" else [given.last_hidden_state.reshape(2, -1), given.pooled]
    parts = parts[1:] if name == "clip" else parts[:1] if name == "no pooling" else parts
    assert compared(config) == words
    found = forward_pass(config, params, inputs).output
    np.testing.assert_allclose(found[:, 0], np.concatenate(parts, axis=-1), rtol=1e-4, atol=1e-5)


def test_a_choice_of_experts_reaches_every_token_of_an_encoder():
    """Its tokens see each other, so nothing is left to compare where two forms choose differently."""
    chosen = np.zeros((2, 1, 3, 2), bool)
    chosen[..., 0] = True
    other = chosen.copy()
    other[0, 0, 2] = other[0, 0, 2, ::-1]  # the last token in the first of two layers
    scores = np.full(chosen.shape, 0.5)
    one, two = (Routing(logits=scores, scores=scores, chosen=each) for each in (chosen, other))
    for is_causal, reached in ((True, [[False, False, True]]), (False, [[True, True, True]])):
        np.testing.assert_array_equal(compare_routing(two, one, is_causal=is_causal).left_out[-1], reached)


def test_other_placements_are_refused():
    config = encoder_config(**{**PRE_LN, "scheme": "post"})
    with pytest.raises(hn.ConfigError, match="only LayerNorm at the entrance of every branch"):
        conversion_of(config, "pre_rmsnorm")
