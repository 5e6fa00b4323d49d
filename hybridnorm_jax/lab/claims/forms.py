"""Claims about Pre-LN, Pre-RMSNorm and Pre-CRMSNorm without training: the conversions change nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.equivalence.comparison import compare_forms
from hybridnorm_jax.equivalence.decoder_forms import decoder_layout
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.equivalence.forward_pass import forward
from hybridnorm_jax.equivalence.measurements import Measured, relative_difference
from hybridnorm_jax.equivalence.proof import LARGEST_RELATIVE, prove
from hybridnorm_jax.equivalence.transforms import decompress, recenter
from hybridnorm_jax.lab.claims.claim import Finding
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig

# Norms with scale and bias, biases everywhere, a tied head and learned positions: all that a conversion must fold.
SIZES: dict[str, Any] = {
    "scheme": "pre",
    "norm": "layernorm",
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "activation": "gelu",
    "d_model": 64,
    "num_layers": 8,
    "num_heads": 4,
    "mlp_dim": 256,
    "dtype": "float64",
    "param_dtype": "float64",
}
MODEL = ModelConfig(positions="learned", max_positions=64, vocab_size=257, **SIZES)
VIT = EncoderConfig(image_size=32, patch_size=8, num_classes=10, **SIZES)
# One rounding error of bfloat16, over the RMS of the stream.
LARGEST_MEAN = 2**-8


def lossless(form: str, *, model: ModelConfig = MODEL) -> Finding:
    """Whether the logits of the converted model are those of the Pre-LN model, in float64."""
    return _below(measured(model).logits[form], LARGEST_RELATIVE, "largest difference of logits, over the largest")


def norm_formula(*, model: ModelConfig = MODEL) -> Finding:
    """Whether CRMSNorm of the stored d - 1 elements is RMSNorm of all d, after the embedding and every block."""
    return _below(np.max(measured(model).norm), LARGEST_RELATIVE, "largest difference of normalized streams")


def from_scratch(*, model: ModelConfig = MODEL) -> Finding:
    """Whether a CRMSNorm model with all its d channels is the Pre-LN model of d + 1 channels."""
    bare = {"norm_scale": False, "norm_bias": False, "outer_norm_scale": False, "outer_norm_bias": False}
    # A tied head would read the table that writes the stream, whose last column is no row of zeros.
    plain = dataclasses.replace(model, tie_embeddings=False, **bare)
    small = dataclasses.replace(plain, norm="crmsnorm")
    wide = dataclasses.replace(plain, d_model=plain.d_model + 1)
    with jax.enable_x64(True):
        params, tokens = drawn(small), random_tokens(small)
        expected = forward(small, params, tokens).output
        found = forward(wide, decompress(params, decoder_layout(small), width=wide.d_model), tokens).output
        difference = float(relative_difference(found, expected))
    return _below(difference, LARGEST_RELATIVE, "largest difference of logits, over the largest")


def mean_in_bfloat16(*, model: ModelConfig = MODEL) -> Finding:
    """Whether the stream of the Pre-RMSNorm form keeps a mean near zero in bfloat16."""
    narrow = dataclasses.replace(model, dtype="float32", param_dtype="float32")
    with jax.enable_x64(True):  # the proof has rows in float64
        params, conversion = drawn(narrow), conversion_of(narrow, "pre_rmsnorm")
        proof = prove(narrow, params, conversion, conversion.convert(params), {"random": random_tokens(model)})
    mean, before = float(proof.means["bfloat16"].max()), float(proof.means["Pre-LN"].max())
    number = f"largest |mean| / RMS in bfloat16: {mean:.1e}; of the Pre-LN model: {before:.1e}"
    return Finding(number=number, holds=mean <= LARGEST_MEAN)


def equal_under_dropout(*, model: ModelConfig = MODEL, rate: float = 0.1) -> Finding:
    """Whether Pre-RMSNorm has the logits of Pre-LN with the same masks, if the mean is taken out behind each mask.

    What is written to the stream is x - mean(x), x = mask * branch / (1 - rate); the weights stay those of Pre-LN.
    Taken out in front of the mask, by recentered weights, the mean comes back with what the mask drops.
    """
    model = dataclasses.replace(model, dropout=rate)
    form = dataclasses.replace(model, norm="rmsnorm")

    def without_mean(call: Callable[..., Array], args: Any, keywords: Any, context: InterceptorContext) -> Array:
        result = call(*args, **keywords)
        return result - result.mean(-1, keepdims=True) if isinstance(context.module, nn.Dropout) else result

    with jax.enable_x64(True):
        params, tokens = drawn(model), random_tokens(model)
        masks: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
        expected = forward(model, params, tokens, **masks).output
        recentered = recenter(params, decoder_layout(model))
        before = float(relative_difference(forward(form, recentered, tokens, **masks).output, expected))
        with nn.intercept_methods(without_mean):
            behind = float(relative_difference(forward(form, params, tokens, **masks).output, expected))
    number = (
        f"largest difference of Pre-RMSNorm's logits, over the largest: {behind:.1e}; "
        f"with the mean taken out first: {before:.1e}"
    )
    return Finding(number=number, holds=behind <= LARGEST_RELATIVE < before)


@functools.cache
def measured(model: ModelConfig | EncoderConfig) -> Measured:
    """What compare_forms finds for drawn parameters; several claims are about the same model."""
    with jax.enable_x64(True):
        inputs = random_images(model) if isinstance(model, EncoderConfig) else random_tokens(model)
        return jax.device_get(jax.jit(functools.partial(compare_forms, model))(drawn(model), inputs))


def drawn(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters in which no norm and no bias is what it starts as: each leaf ~ N(0 or 1, 0.1^2)."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.1 * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree.map_with_path(leaf, abstract_params(config))


def random_tokens(config: ModelConfig, seq: int = 32) -> Int[Array, "2 seq"]:
    """Two sequences of uniform ids."""
    return jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, seq)), jnp.int32)


def random_images(config: EncoderConfig) -> Float[Array, "2 height width channels"]:
    """Two images of normal noise."""
    shape = (2, *present(config.image_size), config.num_channels)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), config.dtype)


def _below(value: float | np.ndarray, limit: float, what: str) -> Finding:
    # Written so that NaN fails.
    return Finding(number=f"{what}: {float(value):.1e}", holds=float(value) <= limit)
