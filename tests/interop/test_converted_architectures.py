"""Every Pre-LN checkpoint of the goldens in both converted forms, in float64: the same logits."""

import dataclasses

import jax
import pytest
from test_architectures import GOLDENS, READ, golden_of

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import to_pre_crmsnorm, to_pre_rmsnorm


def _is_pre_layernorm(name):
    config, _ = hn.load_huggingface(GOLDENS / name)
    return config.norm == "layernorm"


PRE_LAYERNORM = [name for name in READ if _is_pre_layernorm(name)]


def test_there_are_at_least_twenty_five():
    assert len(PRE_LAYERNORM) >= 25


@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
@pytest.mark.parametrize("name", PRE_LAYERNORM)
def test_the_converted_model_computes_the_same(name, convert):
    with jax.enable_x64(True):
        config, params = hn.load_huggingface(GOLDENS / name, dtype="float64")
        config = dataclasses.replace(config, dtype="float64")
        tokens = golden_of(name)["tokens"]
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        other, converted = convert(config, params)
        assert other.norm in ("rmsnorm", "crmsnorm")
        same = hn.Decoder(other).apply({"params": converted}, tokens)
        # Rounding of float64 through a few layers; a step that is left out shows at 1e-3.
        assert float(abs(same - logits).max() / abs(logits).max()) < 1e-12
