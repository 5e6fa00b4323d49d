"""The module that fits a configuration."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from hybridnorm_jax.model.config import ModelConfig, check_is_config
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.encoder import Encoder
from hybridnorm_jax.model.encoder_config import EncoderConfig


def build_model(config: ModelConfig) -> nn.Module:
    """Encoder(config) for an EncoderConfig, Decoder(config) for any other ModelConfig.

    Raises:
      ConfigError: `config` is neither.
    """
    check_is_config(config)
    return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)


def smallest_input(config: ModelConfig) -> Array:
    """An input of one token, or of one image of zeros: what `build_model(config).init` can be called with."""
    if isinstance(config, EncoderConfig) and config.reads_pixels:
        return jnp.zeros((1, *config.image_size, config.num_channels), config.dtype)
    return jnp.zeros((1, 1), jnp.int32)
