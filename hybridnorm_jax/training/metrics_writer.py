"""Where a run's numbers go: metrics.jsonl, TensorBoard event files and, if asked for, Weights & Biases."""

import dataclasses
import json
import math
import secrets
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.whole_files import write_whole


@dataclasses.dataclass(frozen=True)
class WandbRun:
    """What Weights & Biases shows of a run: its project, its name and its configuration."""

    project: str
    name: str
    config: dict[str, Any]


class MetricsWriter:
    """Writes <run>/metrics.jsonl, <run>/tensorboard and a Weights & Biases run.

    metrics.jsonl has one JSON object per line, "step" first. A value that is not a finite number is null, since JSON
    has neither NaN nor infinities; an array becomes nested lists. Every line is on disk when `write` returns.
    TensorBoard and Weights & Biases get the single values that are not null.

    Args:
      run_dir: exists already; local or gs://. An object store cannot append, so there every `write` uploads the file.
      resume_step: the step training goes on from: what was recorded of later steps is dropped, and a torn last line.
        None drops everything.
      wandb: also log to Weights & Biases; a resumed run goes on in its old Weights & Biases run. None: do not.
      enabled: False in all processes but one: then nothing is written.

    Raises:
      MissingExtraError: Weights & Biases or TensorBoard's access to gs:// is not installed.
      UserError: metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        resume_step: int | None,
        wandb: WandbRun | None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        if not enabled:
            return
        run_dir = epath.Path(run_dir)
        self._wandb = None if wandb is None else _start_wandb(run_dir, resume_step, wandb)
        self._file = _JsonLines(run_dir / "metrics.jsonl", resume_step)
        first = 0 if resume_step is None else resume_step + 1
        # Without the suffix a run that is resumed within the same second would overwrite its event file.
        options = {"purge_step": first, "filename_suffix": f".{first}", "flush_secs": 10}
        try:
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), **options)
        except ImportError as error:
            raise MissingExtraError(f"run.dir={run_dir.parent}: TensorBoard", extra="tpu") from error

    def write(self, step: int, values: dict[str, float | np.ndarray | None], *, by_layer: bool = False) -> None:
        """Record the values of one step; UserError where metrics.jsonl cannot be written.

        Args:
          by_layer: arrays have a value for each layer: TensorBoard and Weights & Biases get them too, as name/000, ...
        """
        if not self._enabled:
            return
        values = {name: _finite_or_none(value) for name, value in values.items()}
        self._file.append({"step": step, **values})
        if by_layer:
            values = _single_values(values)
        known = {name: value for name, value in values.items() if isinstance(value, float)}
        for name, value in known.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **known})

    def close(self) -> None:
        """Flush and release everything."""
        if not self._enabled:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class _JsonLines:
    """A file of JSON objects, one per line."""

    def __init__(self, path: epath.Path, resume_step: int | None):
        self._path = path
        self._kept = "".join(_lines_until(path, resume_step))
        self._rewrite()
        self._local = open(path, "a", encoding="utf-8") if _is_local(path) else None  # noqa: SIM115

    def append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False) + "\n"
        if self._local is None:
            self._kept += line
            self._rewrite()
            return
        try:
            self._local.write(line)
            self._local.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _rewrite(self) -> None:
        """Replace the file by what is kept, whole or not at all."""
        try:
            write_whole(self._path, self._kept)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error}") from error

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


def _lines_until(path: epath.Path, resume_step: int | None) -> list[str]:
    """The lines of steps up to resume_step, up to the first that is torn."""
    if resume_step is None or not path.exists():
        return []
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            break
        if step <= resume_step:
            kept.append(line + "\n")
    return kept


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _finite_or_none(value: float | np.ndarray | None) -> float | list | None:
    if isinstance(value, np.ndarray) and value.ndim:
        return [_finite_or_none(part) for part in value]
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _single_values(values: dict[str, Any]) -> dict[str, float | None]:
    """Lists by their elements."""
    single = {}
    for name, value in values.items():
        if isinstance(value, list):
            single |= {f"{name}/{number:03d}": part for number, part in enumerate(value)}
        else:
            single[name] = value
    return single


def _start_wandb(run_dir: epath.Path, resume_step: int | None, shown: WandbRun) -> Any:
    """A Weights & Biases run with "step" on its axes; the id kept in <run>/wandb_id ties it to this run directory."""
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("run.wandb=true", extra="wandb") from error
    id_file = run_dir / "wandb_id"
    if resume_step is None or not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    run = wandb.init(
        project=shown.project,
        name=shown.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run_dir) if _is_local(run_dir) else None,
        config=shown.config,
    )
    # wandb's own step must grow, and falls back on resuming; ours is an axis like any other.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
