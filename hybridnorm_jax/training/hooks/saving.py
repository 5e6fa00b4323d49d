"""Checkpoints of a run that is going on."""

from typing import Any

import jax

from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.yaml_files import to_yaml
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.run_identity import keep_sources
from hybridnorm_jax.training.saved_facts import data_state, write_series


class Saving(Hook):
    """Saves the state after every `every`-th step, after the last, and where the run is stopped."""

    def __init__(self, *, every: int):
        self.every = every
        self._config_yaml = ""
        self._plugins: list[dict[str, Any]] = []

    def start(self, run: Run) -> None:
        """Write the configuration as text, once for all saves, and keep the sources of the plugins."""
        self._config_yaml = to_yaml(run.config)
        used = plugins.plugins_of(run.config.run.plugins)
        self._plugins = plugins.to_json(used)
        if jax.process_index() == 0:
            keep_sources(run.directory, used)

    def after_step(self, run: Run) -> None:
        """Save, in the background unless this is the last step."""
        run.read_late()
        self._save(run, wait=run.step == run.steps)

    def stopped(self, run: Run) -> str:
        """Save what was made, unless it is saved already."""
        run.read_late()
        if run.step == run.first:
            return "no step was made, nothing was to be saved"
        self._save(run, wait=True)
        return f"step {run.step} is saved"

    def _save(self, run: Run, *, wait: bool) -> None:
        write_series(run)
        with run.ledger.phase("checkpoint"):
            run.checkpoints.save(
                run.step,
                run.state,
                data_state=data_state(run),
                config_yaml=self._config_yaml,
                plugins=self._plugins,
                skipped_in_a_row=run.skipped_in_a_row(run.step),
                wait=wait,
            )
        run.clock.restart()
