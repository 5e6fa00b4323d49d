"""Keys of earlier versions, and what their saved configurations mean by keys that they do not have.

Saved configurations hold old keys, and people's commands do; each is read as what it is now.
"""

from hybridnorm_jax.config.run_config import RunSection
from hybridnorm_jax.config_fields import key
from hybridnorm_jax.loggers.logger_kinds import WANDB

RENAMED = {"run.wandb_project": "run.project", "run.wandb_group": "run.group"}
# True or false said whether `wandb` is among this one.
WANDB_SWITCH, LOGGERS_KEY = "run.wandb", "run.loggers"
SWITCH = key(False, "whether run.loggers names wandb")
SWITCH.name, SWITCH.type = "wandb", bool
# What a run that was saved before there was such a key did.
IN_OLD_RUNS = {"train.shuffle_rounds": 4}


def switched(loggers: tuple[str, ...] | None, *, has_wandb: bool) -> tuple[str, ...]:
    """The loggers (None: the default ones) with wandb, or without it."""
    others = tuple(name for name in (RunSection.loggers if loggers is None else loggers) if name != WANDB)
    return (*others, WANDB) if has_wandb else others
