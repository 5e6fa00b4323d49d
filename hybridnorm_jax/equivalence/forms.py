"""Whole-model conversion of our own models: Pre-LN -> Pre-RMSNorm or Pre-CRMSNorm."""

from typing import Any

from hybridnorm_jax.equivalence.decoder_forms import Conversion, decoder_conversion
from hybridnorm_jax.equivalence.encoder_forms import encoder_conversion
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.config import ModelConfig, check_is_config
from hybridnorm_jax.model.encoder_config import EncoderConfig

FORMS = ("pre_rmsnorm", "pre_crmsnorm")


def to_pre_rmsnorm(config: ModelConfig, params: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, params) of a model with RMSNorm that computes the logits of this Pre-LN one, a Decoder or an Encoder.

    Norm scales and biases are folded into what reads them, so biases appear where a norm had one. A tied head is
    untied where its norm has a scale or bias. Norms on q, k, v stay. Dtypes stay, and the arithmetic runs in them, in
    float32 at least: convert in float64 what is to be compared in float64.

    Raises:
      ConfigError: not a Pre-LN model: another norm than LayerNorm, a norm after a branch or a sum, one missing.

    Source: 2305.14858, section 3.1.
    """
    conversion = conversion_of(config, "pre_rmsnorm")
    return conversion.config, conversion.convert(params)


def to_pre_crmsnorm(config: ModelConfig, params: Any, *, pad_to: int = 1) -> tuple[ModelConfig, dict[str, Any]]:
    """As to_pre_rmsnorm, with CRMSNorm on a stream that is stored without its last element.

    The new model.d_model is d - 1, filled up with zero channels to a multiple of `pad_to`; model.norm_width is d. A
    tied head is always untied. Source: 2305.14858, section 3.2.
    """
    conversion = conversion_of(config, "pre_crmsnorm", pad_to=pad_to)
    return conversion.config, conversion.convert(params)


def conversion_of(config: ModelConfig, form: str, *, pad_to: int = 1) -> Conversion:
    """The conversion of a model of this config to `form`, "pre_rmsnorm" or "pre_crmsnorm"; see the functions above."""
    if form not in FORMS:
        raise ConfigError(f"form={form}: must be {' or '.join(FORMS)}")
    check_is_config(config)
    if isinstance(config, EncoderConfig):
        return encoder_conversion(config, form, pad_to=pad_to)
    return decoder_conversion(config, form, pad_to=pad_to)
