"""Which parameters decay."""

from typing import Any

import jax
import numpy as np

from hybridnorm_jax.config.optimizer_section import OptimizerSection


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
