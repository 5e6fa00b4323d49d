"""Every Pre-LN decoder among the checkpoints of tests/goldens/architectures has both cheaper forms."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence as eq

GOLDENS = Path(__file__).parents[1] / "goldens" / "architectures"
PRE_LN = [
    "biogpt",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_window",
    "cohere_qk_norm",
    "falcon_40b",
    "falcon_7b",
    "gpt_bigcode",
    "gpt_neo_global",
    "gpt_neo_local",
    "gptj",
    "mpt",
    "mpt_clip_scale",
    "nemotron",
    "olmo",
    "olmo_clip_qkv",
    "persimmon",
    "phi",
    "phi_qk_layernorm",
    "stablelm",
    "stablelm_parallel_qk",
    "starcoder2",
    "starcoder2_window",
    "xglm",
]


@pytest.mark.parametrize("name", PRE_LN)
def test_both_forms_have_its_logits_in_float64(name):
    with jax.enable_x64(True):
        config, params = hn.load_huggingface(GOLDENS / f"hf_{name}", dtype="float64")
        config = dataclasses.replace(config, dtype="float64")
        tokens = np.load(GOLDENS / f"hf_{name}" / "golden.npz")["tokens"]
        expected = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
        for convert in (eq.to_pre_rmsnorm, eq.to_pre_crmsnorm):
            form, converted = convert(config, params)
            found = jax.jit(hn.Decoder(form).apply)({"params": converted}, tokens)
            # Rounding of float64 through a few layers; a step that is left out shows at 1e-3.
            assert float(abs(found - expected).max() / abs(expected).max()) < 1e-12
