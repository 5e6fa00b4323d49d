"""The layers that moe.py times, what they are given, and how far the dispatches are from their reference."""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridnorm_jax.kernels.experts import apply_experts
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.moe import MoE


class Shape(NamedTuple):
    """A layer's sizes."""

    tokens: int
    embed: int
    mlp: int
    experts: int
    k: int


SMALL, OLMOE = Shape(2048, 512, 256, 64, 8), Shape(4 * 4096, 2048, 1024, 64, 8)


def make_modules(shape: Shape, options: argparse.Namespace) -> dict[str, MoE | FeedForward]:
    """The contestants."""
    sizes = {"num_experts": shape.experts, "experts_per_token": shape.k, "mlp_dim": shape.mlp}
    experts = functools.partial(MoE, **sizes, shared_experts=options.shared, dtype=options.dtype)
    dense = FeedForward(mlp_dim=(shape.k + options.shared) * shape.mlp, dtype=options.dtype)
    return {name: experts(dispatch=name) for name in options.dispatches} | {"feed_forward": dense}


def active_weights(shape: Shape, shared: int, name: str) -> int:
    """How many weights of the layer a token is multiplied with."""
    router = 0 if name == "feed_forward" else shape.embed * shape.experts
    return router + 3 * shape.embed * (shape.k + shared) * shape.mlp


def draw(shape: Shape, skew: bool, modules: dict) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """(x, the result's cotangent, parameters of each contestant), the experts' the same arrays for all dispatches."""
    dtype = modules["feed_forward"].dtype
    keys = jax.random.split(jax.random.key(0), 4)
    x, cotangent = (jax.random.normal(key, (1, *shape[:2]), dtype) for key in keys[:2])
    x = x.at[..., 0].set(1)  # so that the router's kernel holds an offset of each expert
    offsets = np.zeros(shape.experts, np.float32)
    if skew:
        deviation = 0.02 * np.sqrt(shape.embed)  # of the logits
        offsets = np.linspace(3 * deviation, 0, shape.experts, dtype=np.float32)
        offsets[shape.experts - min(shape.experts // 4, shape.experts - shape.k) :] = -1e4
    *dispatches, dense = modules
    experts = jax.jit(modules[dispatches[0]].init)(keys[2], x)["params"]
    experts["router"]["kernel"] = experts["router"]["kernel"].at[0].set(offsets)
    params = dict.fromkeys(dispatches, experts) | {dense: jax.jit(modules[dense].init)(keys[3], x)["params"]}
    return x, cotangent, params


def layer_function(module: MoE | FeedForward, mode: str) -> Callable:
    """(params, x, cotangent) -> y, or (y, gradients of params and x)."""

    def forward(params, x):
        return module.apply({"params": params}, x)

    def forward_backward(params, x, cotangent):
        y, pull_back = jax.vjp(forward, params, x)
        return y, pull_back(cotangent)

    return forward_backward if mode == "forward_backward" else lambda params, x, cotangent: forward(params, x)


def differences(inputs: tuple, chosen, cotangent, options: argparse.Namespace, left_out: dict) -> dict:
    """By dispatch, the largest difference of result and gradients from the reference, over the largest number there."""
    parts = ("y", "x", "gate", "up", "down", "weights")
    # Rounded before, so that the reference starts from the same numbers: inside jit XLA may leave the rounding out.
    arrays = tuple(array.astype(options.dtype) for array in (*inputs[:4], cotangent))

    def run(dispatch, dtype, arrays, weights, chosen):
        *operands, cotangent = (array.astype(dtype) for array in arrays)

        def experts(x, gate, up, down, weights):
            return apply_experts(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=dispatch)

        y, pull_back = jax.vjp(experts, *operands, weights)
        return y, *pull_back(cotangent)

    def compute(name):
        reference = name == "reference"
        with jax.default_matmul_precision("highest" if reference else None):
            function = functools.partial(run, *(("dense", "float32") if reference else (name, options.dtype)))
            return jax.block_until_ready(jax.jit(function)(arrays, inputs[4], chosen))

    @jax.jit
    def off_by(result, reference):
        wide = result.astype(reference.dtype)
        return jnp.abs(wide - reference).max() / jnp.abs(reference).max()

    reference = admit(["reference"], compute, left_out).get("reference")
    if reference is None:
        return {}

    def compare(name):
        return dict(zip(parts, map(float, map(off_by, compute(name), reference)), strict=True))

    return admit(options.dispatches, compare, left_out, "comparison of ")


def admit(names, build: Callable[[str], Any], left_out: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """build(name) for each; what the device's memory is too small for is noted in left_out instead."""
    entrants = {}
    for name in names:
        try:
            entrants[name] = build(name)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            left_out[prefix + name] = str(error).splitlines()[0]
    return entrants
