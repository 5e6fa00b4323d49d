"""hybridnorm_jax: where a transformer normalizes, as data. See README.md."""

from hybridnorm_jax import equivalence
from hybridnorm_jax.attention import Attention
from hybridnorm_jax.block import Block
from hybridnorm_jax.config import ConfigError, ModelConfig, UserError
from hybridnorm_jax.decoder import Decoder
from hybridnorm_jax.feed_forward import FeedForward
from hybridnorm_jax.interop.huggingface import load_huggingface, save_huggingface
from hybridnorm_jax.interop.olmo import params_from_olmo
from hybridnorm_jax.moe import MoE
from hybridnorm_jax.norms import Norm, crms_norm, layer_norm, rms_norm
from hybridnorm_jax.placement import SCHEMES, BlockPlacement, Scheme, SublayerPlacement, scheme

__all__ = [
    "SCHEMES",
    "Attention",
    "Block",
    "BlockPlacement",
    "ConfigError",
    "Decoder",
    "FeedForward",
    "MoE",
    "ModelConfig",
    "Norm",
    "Scheme",
    "SublayerPlacement",
    "UserError",
    "crms_norm",
    "equivalence",
    "layer_norm",
    "load_huggingface",
    "params_from_olmo",
    "rms_norm",
    "save_huggingface",
    "scheme",
]
