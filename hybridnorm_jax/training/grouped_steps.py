"""The steps of several runs at once, which differ in numbers alone: one compiled program computes all of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from hybridnorm_jax.mesh.device_mesh import use_mesh
from hybridnorm_jax.mesh.sharding_rules import Rules
from hybridnorm_jax.model.loss import LossSums
from hybridnorm_jax.training.layer_measures import Measures
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.step import Batch
from hybridnorm_jax.training.xla_options import readable_refusals


class PureSteps(NamedTuple):
    """What is computed for one run, before it is compiled.

    Attributes:
      train: (state, batch, numbers) -> (state, metrics, measured invariants), see step.make_train_step.
      evaluate: (parameters, batch, step) -> loss sums, see step.make_eval_step.
      watch: (state, batch, numbers) -> measures, see layer_measures.make_watch.
    """

    train: Callable
    evaluate: Callable
    watch: Callable


class GroupedSteps:
    """The steps of a group of runs that share their batches.

    The state of a group is a TrainState whose arrays have the runs as their first axis, which is not split over
    devices. What is done for one run is mapped over that axis (jax.vmap) and compiled once for each number of runs.
    """

    def __init__(
        self,
        pure: PureSteps,
        abstract: TrainState,
        *,
        mesh: Mesh,
        rules: Rules,
        compiler_options: dict[str, Any] | None,
    ):
        """Args: `abstract` is the state of one run (state.abstract_state); the others are those of its Program."""
        self._mesh, self._rules = mesh, rules
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        of_group = jax.tree.map(_with_runs_in_front, places)
        whole = NamedSharding(mesh, PartitionSpec())

        def train(states: TrainState, batch: Batch, numbers: Sequence[StepNumbers]) -> tuple[TrainState, list]:
            states, metrics, _ = jax.vmap(pure.train, in_axes=(0, None, 0))(states, batch, _stacked(numbers))
            return states, _apart(metrics, len(numbers))

        def watch(states: TrainState, batch: Batch, numbers: Sequence[StepNumbers]) -> list[Measures]:
            measures = jax.vmap(pure.watch, in_axes=(0, None, 0))(states, batch, _stacked(numbers))
            return _apart(measures, len(numbers))

        self._train = jax.jit(
            train, donate_argnums=0, out_shardings=(of_group, whole), compiler_options=compiler_options
        )
        self._watch = jax.jit(watch, out_shardings=whole)
        self._evaluate = jax.jit(jax.vmap(pure.evaluate, in_axes=(0, None, 0)))
        self._joined = jax.jit(_stacked, out_shardings=of_group)
        self._of_run = jax.jit(_at, out_shardings=places)

    def joined(self, states: Sequence[TrainState]) -> TrainState:
        """The state of the group that these runs are."""
        return self._joined(tuple(states))

    def of_run(self, states: TrainState, index: int) -> TrainState:
        """The state of one run of the group."""
        return self._of_run(states, index)

    def train(
        self, states: TrainState, batch: Batch, numbers: Sequence[StepNumbers]
    ) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        """One update of each run; `states` is donated. The metrics are those of step.make_train_step, run by run.

        Args:
          batch: for all runs, as Program.put gives it.
          numbers: of each run.
        """
        with use_mesh(self._mesh, self._rules), readable_refusals():
            return self._train(states, batch, tuple(numbers))

    def watch(self, states: TrainState, batch: Batch, numbers: Sequence[StepNumbers]) -> list[Measures]:
        """The measures of every layer of each run, before the step that `train` makes of the same arguments."""
        with use_mesh(self._mesh, self._rules):
            return self._watch(states, batch, tuple(numbers))

    def evaluate(self, states: TrainState, batch: Batch) -> LossSums:
        """Loss sums of one batch, a number for each run."""
        with use_mesh(self._mesh, self._rules):
            return self._evaluate(states.params_in_use, batch, states.step)


def _with_runs_in_front(place: NamedSharding) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))


def _stacked(trees: Sequence[Any]) -> Any:
    """Trees as one, whose arrays have them as their first axis.

    It is called in what is compiled, where Python's numbers are weakly typed: none of them may widen a bfloat16 update.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _apart(tree: Any, count: int) -> list[Any]:
    """The opposite of _stacked."""
    return [_at(tree, index) for index in range(count)]


def _at(tree: Any, index: ArrayLike) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
