"""The library's modules for Flax NNX: Norm, Attention, FeedForward, MoE, Block and Decoder as nnx.Module's, and the
two functions that take parameters from here to the Linen modules and back.

What the modules compute is in model: each holds parameters and calls the Linen module of the same name.
"""

from hybridnorm_jax.nnx.conversion import from_linen_params, to_linen_params
from hybridnorm_jax.nnx.modules import Attention, Block, Decoder, FeedForward, MoE, Norm

__all__ = ["Attention", "Block", "Decoder", "FeedForward", "MoE", "Norm", "from_linen_params", "to_linen_params"]
