"""A run in Weights & Biases, online or offline."""

import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.loggers.logger import FAILED, LoggedRun, Logger
from hybridnorm_jax.whole_files import is_local, write_whole

# Weights & Biases may take so long to answer when a run begins.
START_SECONDS = 60
ID_FILE = "wandb_id"
TO_LOG_IN = "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline"
WITHOUT_SERVER = ("offline", "disabled")


class WandbRun(Logger):
    """Logs to one run of Weights & Biases, whose id <run>/wandb_id ties to the run directory.

    Nothing can be taken back there. So a step that is made again after a kill, with the same numbers, is not logged
    again; metrics.jsonl says which steps were. A run that begins again gets a new id.
    """

    def start(self, run: LoggedRun) -> Mapping[str, int]:
        """Begin a run there, or go on with it."""
        id_file = run.directory / ID_FILE
        is_known = run.resume_step is not None and id_file.exists()
        name = id_file.read_text().strip() if is_known else secrets.token_hex(4)
        had_files = (run.directory / "wandb").exists()
        try:
            self._run = _begun(run, name)
        except BaseException:
            if not had_files and is_local(run.directory):
                shutil.rmtree(run.directory / "wandb", ignore_errors=True)
            raise
        if not is_known:
            write_whole(id_file, name)
        self.url = None if self._run.offline else self._run.url
        return run.recorded if is_known else {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        self._run.log({"step": step, **values})

    def abandon(self) -> None:
        """Do not wait for its service at the end of the process, as wandb's own function there does without a limit.

        wandb has no public way to that. Its service sees that this process has ended, and ends too.
        """
        import wandb

        connection = wandb.setup()._connection
        if connection is not None and connection._cleanup is not None:
            connection._cleanup()

    def close(self, how: str) -> None:
        """Wait until Weights & Biases has everything."""
        self._run.finish(exit_code=1 if how == FAILED else 0)


def _begun(run: LoggedRun, name: str) -> Any:
    """A run of wandb with "step" on its axes."""
    os.environ.setdefault("WANDB_SILENT", "true")  # it would write dozens of lines between ours
    import wandb

    # Without this a terminal would be asked for a key.
    if wandb.setup().settings.mode not in WITHOUT_SERVER and not wandb.login(prompt=False, verify=False):
        raise RuntimeError(f"no login; {TO_LOG_IN}")
    begun = wandb.init(
        project=run.project,
        name=run.name,
        group=run.group or None,
        tags=list(run.tags),
        id=name,
        resume="allow",
        dir=os.fspath(run.directory) if is_local(run.directory) else None,
        config=dict(run.config),
        # It would also put itself between the program and its standard output, and hang it where it hangs.
        settings=wandb.Settings(init_timeout=START_SECONDS, console="off"),
    )
    # wandb's own step must grow, and falls back on resuming; ours is an axis like any other.
    begun.define_metric("step")
    begun.define_metric("*", step_metric="step")
    return begun
