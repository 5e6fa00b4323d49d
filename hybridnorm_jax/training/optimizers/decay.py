"""Which parameters decay, and how much."""

from typing import Any

import jax
import numpy as np
import optax

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers.groups import check_patterns, own_number
from hybridnorm_jax.training.optimizers.schedules import StepNumbers


def decay_mask(config: OptimizerSection, params: Any) -> Any:
    """Which parameters decay, by name. What no line names never does, so that a new learned number has to be entered.

        kernel                                          always
        embedding                                       decay_embeddings
        bias, sinks, the scale and matrices of a norm   decay_norms_and_biases

    Never: other learned scales (of a branch, a residual, heads, the embedding), because decay draws them to 0, where
    they switch off what they multiply; alpha, shift and other numbers and vectors of a norm, for the same reason; and
    the biases that balance experts, which no gradient holds against it.

    Args:
      params: of a model, nested dicts; in what its runs hold, the layers are the first axis.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        *modules, name = (part.key for part in path)
        if name == "kernel":
            return True
        if name == "embedding":
            return config.decay_embeddings
        of_norm = bool(modules) and (modules[-1] == "norm" or modules[-1].endswith("_norm"))
        is_stacked = bool(modules) and modules[0].startswith("run_")
        is_matrix = np.ndim(leaf) - is_stacked > 1
        in_group = name in ("bias", "sinks") or (of_norm and (name == "scale" or is_matrix))
        return in_group and config.decay_norms_and_biases

    return jax.tree.map_with_path(decays, params)


def decayed(config: OptimizerSection, numbers: StepNumbers) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the direction of every parameter that decays.

    Those that optimizer.weight_decays names have their own weight decay; of the others decay_mask says which decay.
    """
    patterns = config.weight_decays
    if not patterns:
        return optax.add_decayed_weights(numbers.weight_decay, mask=lambda params: decay_mask(config, params))

    def own(path: tuple[Any, ...]) -> Any:
        return own_number(path, patterns, numbers.weight_decays)

    def mask(params: Any) -> Any:
        check_patterns("optimizer.weight_decays", patterns, params)
        in_general = decay_mask(config, params)
        return jax.tree.map_with_path(lambda path, decays: decays or own(path) is not None, in_general)

    def update(directions: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        def moved(path: tuple[Any, ...], direction: Any, parameter: Any) -> Any:
            number = own(path)
            return direction + (numbers.weight_decay if number is None else number) * parameter

        return jax.tree.map_with_path(moved, directions, params), state

    # The state is that of optax.add_decayed_weights, so that a branch of a run may have other groups.
    return optax.masked(optax.GradientTransformation(lambda params: optax.EmptyState(), update), mask)
