"""What a checkpoint says of a run besides its arrays, and what is written down with it."""

import dataclasses
from typing import Any

from hybridnorm_jax.training.layout import LAYOUT, layout_of
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.trained_before import TRAINED_BEFORE, as_json, own_data


def data_state(run: Run) -> dict[str, Any]:
    """What a checkpoint says of the run's data and layout: JSON, the same in every process."""
    return {
        "iterator": run.iterator.get_state(),
        "train_tokens": run.data.train_tokens,
        "files": list(run.files),
        **own_data(run.config.data, run.data),
        TRAINED_BEFORE: as_json(run.trained_before),
        LAYOUT: dataclasses.asdict(layout_of(run.program)),
    }


def write_series(run: Run) -> None:
    """A run that goes on from this step finds the losses of all steps before it."""
    unwritten = run.series.take()
    if unwritten:
        run.writer.write(run.step, unwritten)
