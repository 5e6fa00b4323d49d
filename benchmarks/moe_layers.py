"""The layers that moe.py times, what they are given, and how far the dispatches are from their reference."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.expert_dispatch import apply_experts
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.moe import MoE, choose_experts

Layer = MoE | FeedForward
# The contestant that is no mixture of experts.
FEED_FORWARD = "feed_forward"


class Shape(NamedTuple):
    """A layer's sizes; `k` experts are chosen for each token."""

    tokens: int
    embed: int
    mlp: int
    experts: int
    k: int


SMALL = Shape(tokens=2048, embed=512, mlp=256, experts=64, k=8)
OLMOE = Shape(tokens=4 * 4096, embed=2048, mlp=1024, experts=64, k=8)


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What all layers share.

    Attributes:
      dispatches: the contestants that are mixtures of experts.
      shared: how many experts see every token.
      dtype: in which the layers compute.
    """

    dispatches: tuple[str, ...]
    shared: int
    dtype: str


def make_modules(shape: Shape, options: LayerOptions) -> dict[str, Layer]:
    """The contestants: one for each dispatch, and FEED_FORWARD."""
    modules: dict[str, Layer] = {}
    for dispatch in options.dispatches:
        modules[dispatch] = MoE(
            num_experts=shape.experts,
            experts_per_token=shape.k,
            mlp_dim=shape.mlp,
            shared_experts=options.shared,
            dtype=options.dtype,
            dispatch=dispatch,
        )
    width = (shape.k + options.shared) * shape.mlp
    modules[FEED_FORWARD] = FeedForward(mlp_dim=width, dtype=options.dtype)
    return modules


def active_weights(shape: Shape, shared: int, name: str) -> int:
    """How many weights of the layer a token is multiplied with."""
    router = 0 if name == FEED_FORWARD else shape.embed * shape.experts
    return router + 3 * shape.embed * (shape.k + shared) * shape.mlp


class LayerArrays(NamedTuple):
    """What the layers are given.

    Attributes:
      cotangent: of the result.
      experts: parameters of the contestants with experts, the same for all dispatches.
      feed_forward: parameters of FEED_FORWARD.
    """

    x: Float[Array, "1 tokens embed"]
    cotangent: Float[Array, "1 tokens embed"]
    experts: dict[str, Any]
    feed_forward: dict[str, Any]

    def params(self, name: str) -> dict[str, Any]:
        """The parameters of a contestant."""
        return self.feed_forward if name == FEED_FORWARD else self.experts


def draw(shape: Shape, modules: Mapping[str, Layer], *, skew: bool) -> LayerArrays:
    """Random inputs and parameters; with `skew` they leave a quarter of the experts empty, as far as k allows."""
    dtype = modules[FEED_FORWARD].dtype
    x_key, cotangent_key, experts_key, feed_forward_key = jax.random.split(jax.random.key(0), 4)
    size = (1, shape.tokens, shape.embed)
    x = jax.random.normal(x_key, size, dtype)
    x = x.at[..., 0].set(1)  # so that the router's kernel holds an offset of each expert
    cotangent = jax.random.normal(cotangent_key, size, dtype)
    any_dispatch = next(name for name in modules if name != FEED_FORWARD)
    experts = jax.jit(modules[any_dispatch].init)(experts_key, x)["params"]
    experts["router"]["kernel"] = experts["router"]["kernel"].at[0].set(_router_offsets(shape, skew=skew))
    feed_forward = jax.jit(modules[FEED_FORWARD].init)(feed_forward_key, x)["params"]
    return LayerArrays(x=x, cotangent=cotangent, experts=experts, feed_forward=feed_forward)


def _router_offsets(shape: Shape, *, skew: bool) -> Float[np.ndarray, "experts"]:
    """What is added to the logits of every token."""
    if not skew:
        return np.zeros(shape.experts, np.float32)
    deviation = 0.02 * np.sqrt(shape.embed)  # of the logits
    offsets = np.linspace(3 * deviation, 0, shape.experts, dtype=np.float32)
    empty = min(shape.experts // 4, shape.experts - shape.k)
    offsets[shape.experts - empty :] = -1e4
    return offsets


def layer_function(module: Layer, mode: str) -> Callable[..., Any]:
    """(params, x, cotangent) -> y in mode forward, (y, gradients of params and x) in mode forward_backward."""

    def apply(params: Any, x: Array) -> Array:
        return module.apply({"params": params}, x)

    def forward(params: Any, x: Array, cotangent: Array) -> Array:
        return apply(params, x)

    def forward_backward(params: Any, x: Array, cotangent: Array) -> tuple[Array, Any]:
        y, pull_back = jax.vjp(apply, params, x)
        return y, pull_back(cotangent)

    return forward_backward if mode == "forward_backward" else forward


class ExpertArrays(NamedTuple):
    """What a dispatch computes from, besides the choice of experts, and the cotangent of its result."""

    x: Float[Array, "tokens embed"]
    gate: Float[Array, "experts embed mlp"]
    up: Float[Array, "experts embed mlp"]
    down: Float[Array, "experts mlp embed"]
    weights: Float[Array, "tokens k"]
    cotangent: Float[Array, "tokens embed"]

    def cast(self, dtype: str) -> "ExpertArrays":
        """The same in another dtype, but for the weights, which stay in the router's."""
        return ExpertArrays(
            x=self.x.astype(dtype),
            gate=self.gate.astype(dtype),
            up=self.up.astype(dtype),
            down=self.down.astype(dtype),
            weights=self.weights,
            cotangent=self.cotangent.astype(dtype),
        )


class RoutedArrays(NamedTuple):
    """The arrays of one layer, and its choice of experts."""

    arrays: ExpertArrays
    chosen: Int[Array, "tokens k"]


def route(layer: LayerArrays, k: int) -> RoutedArrays:
    """Choose the experts once: in several programs, rounding alone could decide a tie differently."""
    x = layer.x[0]
    logits = jnp.matmul(x.astype(jnp.float32), layer.experts["router"]["kernel"], precision="highest")
    weights, chosen = choose_experts(logits, k)
    arrays = ExpertArrays(
        x=x,
        gate=layer.experts["expert_gate"]["kernel"],
        up=layer.experts["expert_up"]["kernel"],
        down=layer.experts["expert_down"]["kernel"],
        weights=weights,
        cotangent=layer.cotangent[0],
    )
    return RoutedArrays(arrays=arrays, chosen=chosen)


class ExpertResults(NamedTuple):
    """The result of the experts, and the gradients of what they compute from."""

    y: Array
    x: Array
    gate: Array
    up: Array
    down: Array
    weights: Array


def compute_experts(dispatch: str, arrays: ExpertArrays, chosen: Int[Array, "tokens k"]) -> ExpertResults:
    """The experts by one dispatch, forward and backward."""

    def experts(x: Array, gate: Array, up: Array, down: Array, weights: Array) -> Array:
        return apply_experts(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=dispatch)

    y, pull_back = jax.vjp(experts, arrays.x, arrays.gate, arrays.up, arrays.down, arrays.weights)
    x, gate, up, down, weights = pull_back(arrays.cotangent)
    return ExpertResults(y=y, x=x, gate=gate, up=up, down=down, weights=weights)


def differences(routed: RoutedArrays, options: LayerOptions, left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """Dispatch -> part of ExpertResults -> its largest difference from the reference, over the largest number there.

    The reference is the dense dispatch in float32 with products at the highest precision.

    Args:
      left_out: gets a line for each dispatch that the device's memory is too small for.
    """
    # Rounded before, so that the reference starts from the same numbers: inside jit XLA may leave the rounding out.
    arrays = routed.arrays.cast(options.dtype)

    def run(dispatch: str, dtype: str) -> ExpertResults:
        function = jax.jit(lambda arrays, chosen: compute_experts(dispatch, arrays.cast(dtype), chosen))
        return jax.block_until_ready(function(arrays, routed.chosen))

    def run_reference(_: str) -> ExpertResults:
        with jax.default_matmul_precision("highest"):
            return run("dense", "float32")

    reference = admit(["reference"], run_reference, left_out).get("reference")
    if reference is None:
        return {}

    def compare(dispatch: str) -> dict[str, float]:
        found = run(dispatch, options.dtype)
        pairs = zip(ExpertResults._fields, found, reference, strict=True)
        return {part: float(_off_by(ours, right)) for part, ours, right in pairs}

    return admit(options.dispatches, compare, left_out, prefix="comparison of ")


@jax.jit
def _off_by(result: Array, reference: Array) -> Float[Array, ""]:
    return jnp.abs(result.astype(reference.dtype) - reference).max() / jnp.abs(reference).max()


def admit(
    names: Iterable[str], build: Callable[[str], Any], left_out: dict[str, str], *, prefix: str = ""
) -> dict[str, Any]:
    """Name -> build(name); a name that the device's memory is too small for gets a line in left_out instead."""
    entrants = {}
    for name in names:
        try:
            entrants[name] = build(name)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            left_out[prefix + name] = str(error).splitlines()[0]
    return entrants
