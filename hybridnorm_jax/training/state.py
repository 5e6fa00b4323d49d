"""What training carries from step to step, born sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from hybridnorm_jax.mesh.sharding_rules import RULES, Rules
from hybridnorm_jax.mesh.shardings import tree_shardings
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.training.anomalies import Anomalies, no_anomalies
from hybridnorm_jax.training.parameter_average import Average, begun_average
from hybridnorm_jax.training.xla_options import initial_state_options


@flax.struct.dataclass
class TrainState:
    """Number of steps, parameters, optimizer state and what is remembered of skipped steps; all on one mesh.

    And the average of the parameters, where the run has one (optimizer.averages); otherwise None.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    anomalies: Anomalies
    average: Average | None = None

    @property
    def params_in_use(self) -> Any:
        """What is evaluated, writes text and is exported: the average where there is one, otherwise the parameters."""
        return self.params if self.average is None else self.average.params


Initializer = Callable[[Array], TrainState]


def init_params(config: ModelConfig, key: Array) -> Any:
    """Fresh parameters. The forward pass that Flax traces for their shapes is one token long and not executed."""
    # A loop over the layers compiles fastest, and a layer's numbers are the same in and out of one.
    plain = dataclasses.replace(config, attention="xla", scan_unroll=1)
    return Decoder(plain).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def make_initializer(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, spike_window: int, has_average: bool = False
) -> Initializer:
    """key -> the state before the first step, not sharded; arguments as those of make_beginning."""
    begin = make_beginning(optimizer, spike_window=spike_window, has_average=has_average)
    return lambda key: begin(init_params(config, key))


def make_beginning(
    optimizer: optax.GradientTransformation, *, spike_window: int, has_average: bool = False
) -> Callable[[Any], TrainState]:
    """Parameters -> the state before the first step, not sharded. It may hold copies of them, as an average does.

    Args:
      spike_window: how many losses are remembered, see anomalies.judge.
      has_average: whether the state holds the average of the parameters.
    """

    def begin(params):
        average = begun_average(params) if has_average else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), no_anomalies(spike_window), average)

    return begin


def abstract_state(initialize: Initializer, mesh: Mesh, rules: Rules = RULES) -> TrainState:
    """Shapes, dtypes and shardings of the state (jax.ShapeDtypeStruct), to restore a checkpoint into."""
    shapes = jax.eval_shape(initialize, jax.random.key(0))
    places = tree_shardings(shapes, mesh, rules)

    def placed(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(placed, shapes, places)


def make_fresh_state(initialize: Initializer, abstract: TrainState) -> Initializer:
    """key -> the state before the first step, sharded as `abstract`; every device computes only its own shards."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = initial_state_options(abstract.step.sharding.mesh.devices.flat[0].platform)
    return jax.jit(initialize, out_shardings=places, compiler_options=options)
