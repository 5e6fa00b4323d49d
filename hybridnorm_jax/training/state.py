"""What training carries from step to step, born sharded."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from hybridnorm_jax.config import ModelConfig
from hybridnorm_jax.decoder import Decoder
from hybridnorm_jax.mesh_rules import Rules
from hybridnorm_jax.sharding import RULES, tree_shardings


@flax.struct.dataclass
class TrainState:
    """Number of updates made, parameters and optimizer state; all global arrays on one mesh."""

    step: Int[Array, ""]
    params: Any
    opt_state: optax.OptState


def init_params(config: ModelConfig, key: Array) -> Any:
    """Fresh parameters. The forward pass that Flax traces for their shapes is one token long and not executed."""
    plain = dataclasses.replace(config, attention="xla")
    return Decoder(plain).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    rules: Rules = RULES,
    *,
    abstract: bool = False,
) -> TrainState:
    """The state before the first step; every device computes only its own shards.

    Args:
      abstract: return shapes, dtypes and shardings (jax.ShapeDtypeStruct) instead, to restore a checkpoint into.
    """

    def initialize(key):
        params = init_params(config, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    key = jax.random.key(seed)
    shapes = jax.eval_shape(initialize, key)
    shardings = tree_shardings(shapes, mesh, rules)
    if abstract:
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)
    return jax.jit(initialize, out_shardings=shardings)(key)
