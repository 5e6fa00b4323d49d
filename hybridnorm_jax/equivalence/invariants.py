"""What must hold of converted parameters and streams, measured in jitted code and asserted through chex.

Measurements are plain arrays: they leave a training step as outputs, and `assert_measured` asserts them outside the
scan and the gradient, in which checks would vanish without a word. Static properties are asserted while tracing.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.equivalence.expert_choices import ROUTED, TIE, Routing, is_router, routing_of
from hybridnorm_jax.equivalence.layout import ResidualLayout, resolve
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.block import STREAM
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.norms import crms_norm, rms_norm

Measured = dict[str, Any]


class InvariantError(UserError):
    """A property that the conversion guarantees does not hold."""


def abstract_params(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters of Decoder(config)."""
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def assert_decoder_params(config: ModelConfig, params: Any) -> None:
    """Assert, from shapes and dtypes alone, that params are those of Decoder(config): every leaf, rank, width, dtype.

    Raises:
      AssertionError: names the first leaf that is missing, left over (a norm's scale not folded, say) or not as it
        has to be.
    """
    expected, found = flatten_dict(abstract_params(config), sep="/"), flatten_dict(params, sep="/")
    dtype = jnp.asarray(found["token_embedding/embedding"]).dtype
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            raise AssertionError(f"{path}: missing")
        if path not in expected:
            folded = path.endswith(("scale", "bias")) and "norm/" in path
            raise AssertionError(f"{path}: {'is left unfolded' if folded else 'has no place in this model'}")
        chex.assert_rank(found[path], expected[path].ndim, custom_message=path)
        chex.assert_shape(found[path], expected[path].shape, custom_message=path)
        chex.assert_type(found[path], dtype, custom_message=path)


def centring_defects(centred: Any, layout: ResidualLayout, before: Any | None = None) -> dict[str, Float[Array, ""]]:
    """For every leaf that writes the stream, how far it is from having zero mean along the axis of the stream.

        max |mean(W, axis)| * sqrt(width) / rms(W before recentring)

    About 1 for a leaf that was not recentred, about one rounding error for one that was.

    Args:
      centred: the tree to measure; `layout` is its layout.
      before: the tree before recentring; a leaf that it has not, or all with None, is measured by its own rms.
    """
    found = resolve(layout, centred)
    reference = found.leaves | ({} if before is None else flatten_dict(before, sep="/"))
    defects = {}
    for path, axis in found.writers.items():
        leaf = jnp.asarray(found.leaves[path])
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        rms = jnp.sqrt(jnp.square(jnp.asarray(reference[path]).astype(wide.dtype)).mean())
        mean = jnp.abs(wide.mean(axis)).max()
        # NaN is no zero: it stays NaN.
        defects[path] = jnp.where(mean == 0, 0, mean * found.width**0.5 / jnp.where(rms > 0, rms, 1))
    return defects


def collected(sown: Mapping[str, Any], collection: str) -> Array:
    """What blocks and decoder have sown into a collection: first after the embedding, then after every block."""
    values = dict(sown[collection])
    (first,) = values.pop("value")
    runs = [values[name]["value"][0] for name in sorted(values, key=lambda name: int(name.rpartition("_")[2]))]
    return jnp.concatenate([first[None], *runs])


def forward(
    config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs
) -> tuple[Float[Array, "batch seq vocab"], Float[Array, "layers_and_1 batch seq embed"], Routing | None]:
    """(logits, the stream after the embedding and after every block, routing), in config.dtype, without dropout.

    The routing is None for a model without experts.
    """
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none")
    variables, collections = {"params": params}, [STREAM]
    if config.num_experts:
        collections += ROUTED
        inputs |= {"capture_intermediates": is_router}
    # By default TPUs and GPUs take float32 products in fewer bits, which would be compared here.
    with jax.default_matmul_precision("highest"):
        logits, sown = Decoder(plain).apply(variables, tokens, mutable=collections, **inputs)
    return logits, collected(sown, STREAM), routing_of(config, params, sown) if config.num_experts else None


def stream_defects(
    full: Float[Array, "layers batch seq width"],
    stored: Float[Array, "layers batch seq stored"],
    eps: float,
    left_out: Bool[Array, "layers batch seq"] | None = None,
) -> Measured:
    """Per layer, how far a stored stream and its norm are from the full, zero-mean one; all relative to its rms.

    Args:
      left_out: where the streams are not compared, see routing; the padding is measured everywhere.

    Returns:
      stored: the first width - 1 elements; padding: what lies behind them; last: the recovered element, -sum(stored);
      norm: CRMSNorm of the stored stream against RMSNorm of the full one, absolute.
    """
    width = full.shape[-1]
    rms = jnp.sqrt(jnp.square(full).mean(-1, keepdims=True))
    rms = jnp.where(rms > 0, rms, 1)
    kept, padding = stored[..., : width - 1], stored[..., width - 1 :]
    differences = {
        "stored": (kept - full[..., :-1]) / rms,
        "last": (-kept.sum(-1, keepdims=True) - full[..., -1:]) / rms,
        "norm": crms_norm(stored, eps=eps, width=width)[..., : width - 1] - rms_norm(full, eps=eps)[..., :-1],
    }
    if left_out is not None:
        differences = {name: jnp.where(left_out[..., None], 0, value) for name, value in differences.items()}
    if padding.shape[-1]:
        differences["padding"] = padding / rms
    return {name: jnp.abs(value).max((1, 2, 3)) for name, value in differences.items()}


def relative_difference(
    found: Float[Array, "batch seq width"],
    expected: Float[Array, "batch seq width"],
    left_out: Bool[Array, "batch seq"] | None = None,
) -> Float[Array, ""]:
    """max |found - expected| / max |expected|; absolute where all that is expected is 0.

    Args:
      left_out: where the two are not compared, see routing.
    """
    largest, difference = jnp.abs(expected).max(), jnp.abs(found - expected)
    if left_out is not None:
        difference = jnp.where(left_out[..., None], 0, difference)
    return difference.max() / jnp.where(largest > 0, largest, 1)


def rounding(dtype: Any, depth: int) -> float:
    """What `depth` roundings in this dtype leave of a mean that should be zero, in units of zero_mean_defect.

    A rounding leaves an error of about eps per element, whose mean over a vector has defect eps; `depth` of them add
    up as a random walk. 16 covers the largest of many tokens. At most 0.3: a vector that was never centred has 1.
    """
    return min(16 * float(jnp.finfo(dtype).eps) * math.sqrt(depth), 0.3)


def tolerances(config: ModelConfig, platform: str = "cpu") -> dict[str, float]:
    """The largest value of each measurement that rounding explains, for a model of this depth and these dtypes.

    leaves: of parameters; trained: of the stream in the compute dtype; stream: of the stream in float32 or float64;
    ties: of experts' scores, see routing.RoutingDifference; all others: of a comparison of two forward passes in
    float32 or float64.
    """
    depth = 2 * config.num_layers + 2
    # Converted parameters have been rounded, whatever arithmetic they are used in.
    both = (config.dtype, config.param_dtype) == ("float64", "float64")
    wide = jnp.dtype(jnp.float64 if both else jnp.float32)
    # Two forward passes differ by what each rounds, grown by the layers behind.
    same = 1e-9 if both else 1e-3
    return {
        "leaves": rounding(config.param_dtype, config.d_model),
        # Elsewhere than on a CPU a float32 product may round its factors to bfloat16.
        "trained": rounding(jnp.bfloat16 if config.dtype == "bfloat16" or platform != "cpu" else wide, depth),
        "stream": rounding(wide, depth),
        **dict.fromkeys(("stored", "last", "norm", "padding", "logits", "routers"), same),
        "ties": TIE * same,
    }


def assert_measured(step: Any, measured: Measured, limits: Mapping[str, float]) -> None:
    """Assert all measurements through chex, outside any scan or gradient.

    Args:
      step: number of the training step, for the message.
      measured: {"leaves": {path: value}, "logits": {form: value}, "routers" and "ties": a value for each block,
        another name: a value for the embedding and each block}; names that are none of these are not asserted.
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
def _asserted(limits: tuple[tuple[str, float], ...]):
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
    for path, value in measured.get("leaves", {}).items():
        _check(value, limits["leaves"], f"step {{step}}: {path} is not centred: {_UNIT} is {{size}}", step=step)
    for name, phrase in _PHRASES.items():
        if name in measured:
            values = measured[name]
            worst = _worst(values)
            message = f"step {{step}}, after block {{block}} (0: the embedding): {phrase} is {{size}}"
            _check(values[worst], limits[name], message, step=step, block=worst)
    for name, phrase in _ROUTER_PHRASES.items():
        if name in measured:
            worst = _worst(measured[name])
            message = f"step {{step}}, in block {{block}}: {phrase} {{size}}"
            _check(measured[name][worst], limits[name], message, step=step, block=worst + 1)
    for form, value in measured.get("logits", {}).items():
        _check(value, limits["logits"], f"step {{step}}: logits of {form} differ by {{size}}", step=step)
    return step


def _worst(values: Float[Array, " blocks"]) -> Int[Array, ""]:
    return jnp.argmax(jnp.where(jnp.isnan(values), jnp.inf, values))


def _check(value: Array, limit: float, message: str, **parts: Array) -> None:
    # Written so that NaN fails.
    checkify.check(value <= limit, f"{message}, at most {limit:.2g} is rounding", size=value, **parts)
