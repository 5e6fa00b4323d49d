"""OPTIMIZERS, the table of every optimizer that a run can have (optimizer.name).

A new one is a row here, and its function in training/optimizers/directions.py. Nothing else asks for an optimizer by
its name. Keys of the section `optimizer` that begin with the name are for this optimizer only.

Nothing here imports JAX, so that configurations are checked at once.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What the library has to know of an optimizer.

    Attributes:
      direction: the name of the function in training/optimizers/directions.py that makes gradients a direction.
      follows_width: whether every number moves by about the learning rate, whatever the size of its gradient is: the
        rules of model.base_width hold for such optimizers alone.
      narrow_moments: whether its moments may be kept in bfloat16 (optimizer.moment_dtype).
      splits_matrices: whether the matrices inside blocks are updated in another way than other parameters, and have
        the keys optimizer.muon_except and optimizer.muon_rate_factor.
      averages_steps: whether the learning rate stays constant and the optimizer averages the steps instead. This
        average is then what is evaluated and exported.
      unread: keys of the section `optimizer` that other optimizers read and this one does not.
    """

    direction: str
    follows_width: bool = False
    narrow_moments: bool = True
    splits_matrices: bool = False
    averages_steps: bool = False
    unread: tuple[str, ...] = ()


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(direction="adam", follows_width=True),
    # A few means of squares, which need float32 and hardly any memory.
    "adafactor": OptimizerKind(direction="adafactor", narrow_moments=False, unread=("b1", "b2", "eps")),
    "lion": OptimizerKind(direction="lion", follows_width=True, unread=("eps",)),
    "muon": OptimizerKind(direction="muon", splits_matrices=True),
    "schedule_free": OptimizerKind(direction="root_mean_square", averages_steps=True),
}


def averaging_settings() -> str:
    """The settings that make a run average its parameters, for messages."""
    names = (name for name, kind in OPTIMIZERS.items() if kind.averages_steps)
    return ", or ".join(["optimizer.ema_decay", *(f"optimizer.name={name}" for name in names)])
