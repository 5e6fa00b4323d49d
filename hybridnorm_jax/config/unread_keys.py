"""Keys that are set and that nothing reads, because another key decides so.

They are no errors: a saved run, or a named configuration of which one key was changed, may hold them. But whoever has
set one expects something of it, so the first lines of a run say that it has no effect.
"""

import dataclasses
from collections.abc import Iterator

from hybridnorm_jax.config.optimizer_section import UNREAD_BY_SCHEDULE
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import spelled


def unread_keys(config: RunConfig) -> list[str]:
    """What is said of each key with another value than its default that has no effect.

    For example "optimizer.eps=1e-06 has no effect with optimizer.name=lion".
    """
    defaults = {
        f"{section}.{field.name}": (getattr(getattr(config, section), field.name), field.default)
        for section in ("optimizer", "data")
        for field in dataclasses.fields(getattr(config, section))
    }
    return [
        f"{name}={spelled(defaults[name][0])} has no effect with {because}"
        for name, because in _without_effect(config)
        if defaults[name][0] != defaults[name][1]
    ]


def _without_effect(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, the setting because of which nothing reads it)."""
    optimizer, data = config.optimizer, config.data
    for name in optimizer.kind.unread:
        yield f"optimizer.{name}", f"optimizer.name={optimizer.name}"
    for name in UNREAD_BY_SCHEDULE[optimizer.schedule]:
        yield f"optimizer.{name}", f"optimizer.schedule={optimizer.schedule}"
    if not config.model.balance_bias:
        yield "optimizer.balance_bias_rate", "model.balance_bias=false"
    if not data.fim_rate:
        yield "data.fim_spm_rate", "data.fim_rate=0"
    if not data.mixture:
        yield "data.mixture_unit", "data.mixture={}"
