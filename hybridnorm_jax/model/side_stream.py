"""The two ends of a side stream: how it begins, and how it and the residual stream become one."""

import jax.numpy as jnp
from flax import linen as nn

from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.formula import Stream, Streams, times
from hybridnorm_jax.model.outside import out_of_blocks, outer_norm


def begun(config: ModelConfig, x: Stream) -> Streams:
    """The streams before the first block, which x enters; the side stream is start_scale * x, where there is one."""
    ends = config.side_stream
    return Streams(main=x, side=None if ends is None else times(_number(config, ends.start_scale), x))


class JoinedStreams(nn.Module):
    """main_scale * x + N(s), with main_norm main_scale * N(x) + N(s); x alone where there is no side stream s.

    ResiDual (2304.14802) and SiameseNorm (2602.08064). Parameters, where there is one: `side_norm` and, with main_norm,
    `main_norm`.

    Attributes:
      config: of the model; its scheme says how the streams end.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, streams: Streams) -> Stream:
        config, ends = self.config, self.config.side_stream
        main = out_of_blocks(config, streams.main)
        if ends is None or streams.side is None:
            return main
        if ends.main_norm:
            main = outer_norm(config, name="main_norm")(main)
        side_norm = outer_norm(config, epsilon=ends.side_norm_eps, name="side_norm")
        return times(_number(config, ends.main_scale), main) + side_norm(out_of_blocks(config, streams.side))


def _number(config: ModelConfig, value: float) -> Stream | None:
    return None if value == 1 else jnp.asarray(value, wide_dtype(config.dtype))
