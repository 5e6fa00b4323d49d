"""Every Pre-LN checkpoint of the goldens in both converted forms, in float64: the same logits."""

import dataclasses
import functools

import jax
import pytest
from covering import diagonal
from test_architectures import GOLDENS, READ, document_of, golden_of

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import to_pre_crmsnorm, to_pre_rmsnorm
from hybridnorm_jax.interop.architectures import config_from_json


def _is_pre_layernorm(name):
    _, config = config_from_json(document_of(name), "config.json")
    return config.norm == "layernorm"


PRE_LAYERNORM = [name for name in READ if _is_pre_layernorm(name)]


def test_there_are_at_least_twenty_five():
    assert len(PRE_LAYERNORM) >= 25


def _logits(config, params, tokens):
    return jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)


@functools.cache
def _original(name):
    """(config, params, logits) of a checkpoint, for both forms."""
    config, params = hn.load_huggingface(GOLDENS / name, dtype="float64")
    config = dataclasses.replace(config, dtype="float64")
    return config, params, _logits(config, params, golden_of(name)["tokens"])


FORMS = {"pre_rmsnorm": to_pre_rmsnorm, "pre_crmsnorm": to_pre_crmsnorm}


# Both forms of a checkpoint one after the other, mostly by the same worker.
@pytest.mark.parametrize(("name", "form"), diagonal(PRE_LAYERNORM, FORMS, apart=5))
def test_the_converted_model_computes_the_same(name, form):
    convert = FORMS[form]
    with jax.enable_x64(True):
        config, params, logits = _original(name)
        other, converted = convert(config, params)
        assert other.norm in ("rmsnorm", "crmsnorm")
        same = _logits(other, converted, golden_of(name)["tokens"])
        # Rounding of float64 through a few layers; a step that is left out shows at 1e-3.
        assert float(abs(same - logits).max() / abs(logits).max()) < 1e-12
