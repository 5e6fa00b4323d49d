"""Checkpoints of a run that is going on, on the hosts' own disks."""

from typing import Any

from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.yaml_files import to_yaml
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.saved_facts import data_state, write_series


class LocalSaving(Hook):
    """Saves the state on the hosts' own disks after every `every`-th step, unless it was skipped or is saved anyway."""

    def __init__(self, *, every: int | None):
        self.every = every
        self._facts: dict[str, Any] = {}

    def start(self, run: Run) -> None:
        """Write the configuration as text, once for all saves."""
        used = plugins.to_json(plugins.plugins_of(run.config.run.plugins))
        self._facts = {"config_yaml": to_yaml(run.config), "plugins": used}

    def after_step(self, run: Run) -> None:
        """Copy the state to the host's memory; it is written in the background."""
        run.read_late()
        is_saved = run.step == run.steps or run.step % run.config.checkpoint.every == 0
        if run.local is not None and not is_saved and not run.was_skipped(run.step):
            write_series(run)
            with run.ledger.phase("checkpoint"):
                run.local.save(run.step, run.state, {**self._facts, "data_state": data_state(run)})
        run.clock.restart()
