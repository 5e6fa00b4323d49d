"""Tiny models of transformers' own classes with random parameters: what our reader is compared with.

Their keys are drawn in drawn_decoders.py.
"""

import contextlib

import numpy as np
import pytest

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# Token ids beyond a small vocabulary.
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


@contextlib.contextmanager
def in_float64():
    """All that transformers computes is float64, also where its code asks for float32: in norms, softmax, rotations.

    Constants are as exact: where it has sqrt(2 / pi) with 8 or 10 digits torch's own function stands. No weights
    can be read from a file meanwhile: their float32 would be taken for float64.
    """
    import safetensors.torch  # noqa: F401 - these two keep tables of dtypes, which must be those of torch
    import torch
    import transformers.modeling_utils  # noqa: F401
    from transformers import activations
    from transformers.models.bloom import modeling_bloom

    def gelu_tanh(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_bloom, "bloom_gelu_forward", gelu_tanh)
        patch.setattr(activations.FastGELUActivation, "forward", lambda self, x: gelu_tanh(x))
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(name, keys, seed=0):
    """The model of these keys, with random parameters: in float32, or within in_float64 the same numbers in float64."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, **(TOKENS | keys))
    return drawn_parameters(transformers.AutoModelForCausalLM.from_config(config, **EAGER), seed)


def drawn_parameters(model, seed):
    """The model with every parameter drawn at random."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.to(torch.float32).parameters():
            matrix = parameter.dim() > 1
            # Norm scales, for most of the vectors, are not near 0, where everything would vanish.
            centre, scale = (0, 0.3) if matrix else (0.7, 0.5)
            drawn = centre + scale * rng.standard_normal(parameter.shape, np.float32)
            parameter.copy_(torch.from_numpy(drawn))
    return model.eval()


def logits_of(model, tokens):
    """Its logits."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def exact_logits_of(model, tokens):
    """Those of a model in float32, computed in float64."""
    import torch
    import transformers

    given = dict(model.named_parameters())
    with in_float64(), torch.no_grad():
        exact = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float64, **EAGER).eval()
        for name, parameter in exact.named_parameters():
            parameter.copy_(given[name])
        return logits_of(exact, tokens)


def tokens_of(keys, seed=0, shape=(2, 11)):
    """Tokens for a model of these keys."""
    return np.random.default_rng(seed).integers(0, keys["vocab_size"], shape).astype(np.int32)
