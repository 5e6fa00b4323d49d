"""Learning rates that follow the width of the model (muP, see model/width_scaling.py)."""

from typing import Any

import jax
import optax

from hybridnorm_jax.model.width_scaling import kind_of, rate_for_width


def by_width(core: optax.GradientTransformation, ratio: float) -> optax.GradientTransformation:
    """The directions of `core`, those of each parameter times rate_for_width(its kind, ratio).

    It belongs before what adds the weight decay: the decay of a step, rate * weight_decay, then does not depend on the
    width, as in the authors' code (microsoft/mup, MuAdamW). The state is that of `core`.

    Args:
      core: of an optimizer that follows the width (config/optimizer_kinds.py).
      ratio: of the model's width to that for which the rates are stated; with 1 `core` is returned.
    """
    if ratio == 1:
        return core

    def update(gradient: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        directions, state = core.update(gradient, state, params)

        def scaled(path: tuple[Any, ...], direction: Any) -> Any:
            factor = rate_for_width(kind_of(tuple(part.key for part in path)), ratio)
            return direction if factor == 1 else factor * direction

        return jax.tree.map_with_path(scaled, directions), state

    return optax.GradientTransformation(core.init, update)
