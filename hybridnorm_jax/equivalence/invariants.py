"""What must hold of converted parameters and streams: the limits of what is measured, asserted through chex.

Measurements (measurements.py) are plain arrays and leave a training step as outputs. `assert_measured` asserts them
outside the scan and the gradient, in which checks would vanish without a word.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from hybridnorm_jax.equivalence.expert_choices import TIE
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig


class InvariantError(UserError):
    """A property that the conversion guarantees does not hold."""


def rounding(dtype: Any, depth: int) -> float:
    """What `depth` roundings in this dtype leave of a mean that should be zero, in units of zero_mean_defect.

    A rounding leaves an error of about eps per element, whose mean over a vector has defect eps; `depth` of them add
    up as a random walk. 16 covers the largest of many tokens. At most 0.3: a vector that was never centred has 1.
    """
    return min(16 * float(jnp.finfo(dtype).eps) * math.sqrt(depth), 0.3)


def tolerances(config: ModelConfig, platform: str = "cpu") -> dict[str, float]:
    """The largest value of each measurement that rounding explains, for a model of this depth and these dtypes.

    leaves: of parameters; trained: of the stream in the compute dtype; stream: of the stream in float32 or float64;
    ties: of experts' scores, see expert_choices.RoutingDifference; all others: of a comparison of two forward passes in
    float32 or float64.
    """
    depth = 2 * config.num_layers + 2
    # Converted parameters have been rounded, whatever arithmetic they are used in.
    both_float64 = config.dtype == "float64" and config.param_dtype == "float64"
    wide = jnp.dtype(jnp.float64 if both_float64 else jnp.float32)
    # Elsewhere than on a CPU a float32 product may round its factors to bfloat16.
    trained_in = jnp.bfloat16 if config.dtype == "bfloat16" or platform != "cpu" else wide
    # Two forward passes differ by what each rounds, grown by the layers behind.
    same = 1e-9 if both_float64 else 1e-3
    return {
        "leaves": rounding(config.param_dtype, config.d_model),
        "trained": rounding(trained_in, depth),
        "stream": rounding(wide, depth),
        **dict.fromkeys(("stored", "last", "norm", "padding", "logits", "routers"), same),
        "ties": TIE * same,
    }


def assert_measured(step: Any, measured: Measured, limits: Mapping[str, float]) -> None:
    """Assert all measurements through chex, outside any scan or gradient.

    Args:
      step: number of the training step, for the message.
      measured: of which all that is there is asserted, but for `left_out`.
      limits: as `tolerances`.

    Raises:
      InvariantError: one line with step, leaf or layer, and the size of the violation.
    """
    names = tuple(sorted(limits.items()))
    try:
        _asserted(names)(step, measured)
    except checkify.JaxRuntimeError as error:
        raise InvariantError(str(error).partition(" (`check` failed")[0]) from None


@cache
def _asserted(limits: tuple[tuple[str, float], ...]) -> Callable[[Any, Measured], Array]:
    """The chexified assertion function, one for each set of limits, so that it compiles once."""
    # At exit chex warns of checks that may be pending, of synchronous ones too.
    logging.getLogger("absl").addFilter(lambda record: "[Chex] Some of chexify" not in str(record.msg))
    return chex.chexify(jax.jit(partial(_assert_all, dict(limits))), async_check=False)


_UNIT = "|mean| * sqrt(width) / rms"
_PHRASES = {
    "trained": f"the stream of the training forward pass is not centred (or its padding not zero): {_UNIT}",
    "stream": f"the stream is not centred: {_UNIT}",
    "stored": "the stored stream's difference from the full one",
    "last": "the recovered last element's difference from the full stream's",
    "norm": "CRMSNorm's difference from RMSNorm of the full stream",
    "padding": "the padding of the stream",
}
_ROUTER_PHRASES = {
    "routers": "the forms' router logits, of tokens that they have sent the same way so far, differ by",
    "ties": "the forms chose different experts whose scores do not tie: their gap is",
}


def _assert_all(limits: dict[str, float], step: Array, measured: Measured) -> Array:
    """Leaves first: a leaf that is not centred is the cause of all that follows."""
    for path, value in (measured.leaves or {}).items():
        _check(value, limits["leaves"], f"step {{step}}: {path} is not centred: {_UNIT} is {{size}}", step=step)
    for name, phrase in _PHRASES.items():
        values = getattr(measured, name)
        if values is not None:
            worst = _worst(values)
            message = f"step {{step}}, after block {{block}} (0: the embedding): {phrase} is {{size}}"
            _check(values[worst], limits[name], message, step=step, block=worst)
    for name, phrase in _ROUTER_PHRASES.items():
        values = getattr(measured, name)
        if values is not None:
            worst = _worst(values)
            message = f"step {{step}}, in block {{block}}: {phrase} {{size}}"
            _check(values[worst], limits[name], message, step=step, block=worst + 1)
    for form, value in (measured.logits or {}).items():
        _check(value, limits["logits"], f"step {{step}}: logits of {form} differ by {{size}}", step=step)
    return step


def _worst(values: Float[Array, " blocks"]) -> Int[Array, ""]:
    return jnp.argmax(jnp.where(jnp.isnan(values), jnp.inf, values))


def _check(value: Array, limit: float, message: str, **parts: Array) -> None:
    # Written so that NaN fails.
    checkify.check(value <= limit, f"{message}, at most {limit:.2g} is rounding", size=value, **parts)
