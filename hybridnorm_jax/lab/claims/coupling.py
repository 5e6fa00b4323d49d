"""Theorem 2 of HybridNorm: how far the gradient of one of W_Q, W_K, W_V depends on the size of the others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridnorm_jax.lab.claims.claim import Finding
from hybridnorm_jax.model.attention import Attention
from hybridnorm_jax.model.schemes import SCHEMES

MATRICES = ("query", "key", "value")
# What counts as coupled and as not: without norms W_V's share is exactly 1, with them epsilon leaves about 1e-5.
COUPLED, UNCOUPLED = 0.5, 0.01
HEADS, EMBED, SEQ = 4, 64, 32


def elasticities(
    attention: Attention, params: Any, x: Float[Array, "batch seq embed"], cotangent: Float[Array, "batch seq embed"]
) -> Float[np.ndarray, "3 3"]:
    """d log |dL/dW_a| / d log c at c = 1, where c W_b stands for W_b and L = sum(cotangent * attention(x)).

    Rows are a and columns b, both in the order of MATRICES. 0 says that the gradient of W_a does not depend on the size
    of W_b, 1 that it is proportional to it. Source: HybridNorm (2503.04598), theorem 2, whose bound on a gradient has
    norms of the other matrices without QKV-norm and has none of them with it.
    """

    def loss(params: Any) -> Array:
        return jnp.vdot(cotangent, attention.apply({"params": params}, x))

    def log_norms(factors: Float[Array, " 3"]) -> Float[Array, " 3"]:
        scaled = {
            name: {**params[name], "kernel": factor * params[name]["kernel"]}
            for name, factor in zip(MATRICES, factors, strict=True)
        }
        gradient = jax.grad(loss)({**params, **scaled})
        return jnp.stack([jnp.log(jnp.linalg.norm(gradient[name]["kernel"])) for name in MATRICES])

    return np.asarray(jax.jit(jax.jacrev(log_norms))(jnp.ones(len(MATRICES), x.dtype)))


def decoupled(*, scheme: str = "hybrid", without: str = "pre") -> Finding:
    """Whether attention's gradients depend on the size of other matrices in `without`, and do not in `scheme`."""
    with jax.enable_x64(True):
        normalized, plain = (np.abs(_of_scheme(name)) for name in (scheme, without))
    others = ~np.eye(len(MATRICES), dtype=bool)
    with_norms, without_norms = float(normalized[others].max()), float(plain[others].max())
    number = f"largest elasticity: {scheme} {with_norms:.1e}, {without} {without_norms:.3g}"
    return Finding(number=number, holds=with_norms < UNCOUPLED and without_norms > COUPLED)


@functools.cache
def _of_scheme(scheme: str) -> Float[np.ndarray, "3 3"]:
    return elasticities(*_layer(scheme))


def _layer(scheme: str) -> tuple[Attention, Any, Array, Array]:
    """One attention layer with the norms that a scheme has in it, its parameters, an input and a cotangent."""
    placement = SCHEMES[scheme].block(1, 4)
    attention = Attention(
        num_heads=HEADS,
        q_norm=placement.q_norm,
        k_norm=placement.k_norm,
        v_norm=placement.v_norm,
        context_norm=placement.context_norm,
        rope_theta=10_000.0,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
    )
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, SEQ, EMBED))) for _ in range(2))
    shapes = jax.eval_shape(attention.init, jax.random.key(0), x)["params"]

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Array:
        # 1/sqrt(embed) gives q, k and v of unit size; scales of norms start at 1.
        return jnp.asarray(
            np.ones(shape.shape) if path[-1].key == "scale" else rng.standard_normal(shape.shape) / EMBED**0.5
        )

    return attention, jax.tree.map_with_path(leaf, shapes), x, cotangent
