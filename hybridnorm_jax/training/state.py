"""What training carries from step to step, born sharded."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from hybridnorm_jax.mesh.sharding_rules import RULES, Rules
from hybridnorm_jax.mesh.shardings import tree_shardings
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.training.anomalies import Anomalies, no_anomalies


@flax.struct.dataclass
class TrainState:
    """Number of steps, parameters, optimizer state and what is remembered of skipped steps; all on one mesh."""

    step: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    anomalies: Anomalies


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
    spike_window: int,
    abstract: bool = False,
) -> TrainState:
    """The state before the first step; every device computes only its own shards.

    Args:
      spike_window: losses that are remembered, see anomalies.judge.
      abstract: return shapes, dtypes and shardings (jax.ShapeDtypeStruct) instead, to restore a checkpoint into.
    """

    def initialize(key):
        params = init_params(config, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), no_anomalies(spike_window))

    key = jax.random.key(seed)
    shapes = jax.eval_shape(initialize, key)
    shardings = tree_shardings(shapes, mesh, rules)
    if abstract:
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)
    return jax.jit(initialize, out_shardings=shardings)(key)
