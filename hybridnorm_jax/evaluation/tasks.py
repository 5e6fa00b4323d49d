"""Tasks of the LM Evaluation Harness: found by name or file, loaded with their data, and scored.

lm_eval, the extra `eval`, is imported only inside the functions that need it. lm_eval_model.py is the model as the
harness calls it.
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import yaml

from hybridnorm_jax.errors import MissingExtraError, UserError, first_line
from hybridnorm_jax.evaluation.answers import check_length, read_options
from hybridnorm_jax.evaluation.paper_tasks import OWN_TASKS, PAPER, PAPER_TASKS
from hybridnorm_jax.streams import can_redraw

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

# Seeds of the harness's own command line, for the same few-shot examples.
PYTHON_SEED, OTHER_SEED = 0, 1234
NO_FORKS = "DISABLE_MULTIPROC"
# Resamplings for the standard errors of metrics that are no means.
RESAMPLINGS = 1000


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks with their data.

    Attributes:
      asked: the names and paths by which they were named.
      loaded: "tasks", "groups" and "group_map", as the harness's TaskManager loads them.
    """

    asked: tuple[str, ...]
    loaded: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """How well a model does in one task, or on average in a group of them.

    Attributes:
      metrics: name -> value. What a filter other than the first plain one gave is called METRIC,FILTER.
      errors: name -> standard error, where the harness knows it.
      samples: how many documents were scored.
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    samples: int

    def as_json(self) -> dict[str, Any]:
        """The metrics, their errors as METRIC_stderr, and the number of samples; null for what is not finite."""
        values = {**self.metrics, **{f"{name}_stderr": error for name, error in self.errors.items()}}
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {**known, "samples": self.samples}


def check_lm_eval(key: str) -> None:
    """Raise MissingExtraError where lm_eval is not installed; `key` asked for tasks."""
    try:
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(key, extra="eval") from error


def open_tasks(names: Sequence[str], *, key: str, window: int) -> Tasks:
    """Find tasks and load their data, which may download it.

    Args:
      names: of tasks, groups and tags of the harness; `hybridnorm`: those of the paper; paths of a YAML file in the
        harness's format, or of a folder of them. Functions that such a file names are imported and called.
      key: that names them, for messages.
      window: the most tokens that the model reads.

    Raises:
      UserError: lm_eval is not installed, a name is unknown, a file is none, data cannot be loaded, or an answer may be
        longer than the window.
    """
    check_lm_eval(key)
    asked = tuple(dict.fromkeys(names))
    if not asked:
        raise UserError(f"{key}: names no task; give one, such as hellaswag, or a folder of task files")
    plain = [each for name in asked for each in (PAPER_TASKS if name == PAPER else [name])]
    folders = {name: _folder(name, key) for name in plain if _is_path(name)}
    with _harness_settings():
        needs_names = any(name not in folders for name in plain)
        manager = _manager(tuple(str(folder) for folder in folders.values()), with_own=needs_names)
        specs = [spec for name in plain for spec in _specs(name, manager, folders, key)]
        loaded = _load(manager, specs, key)
        for name, task in loaded["tasks"].items():
            _prepare(name, task, window)
    return Tasks(asked, loaded)


def evaluate_tasks(model: "LM", tasks: Tasks, *, limit: int | None = None) -> dict[str, TaskScore]:
    """The scores of all tasks and groups, by name.

    Args:
      model: as the harness calls it.
      tasks: the same may be scored again and again.
      limit: of each task only so many documents, its first; None: all.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=OTHER_SEED)  # each time, or the next score would be one after other examples
    with _harness_settings():
        results = evaluate(
            lm=model, task_dict=tasks.loaded, limit=limit, bootstrap_iters=RESAMPLINGS, log_samples=False
        )
    return {name: _score(values) for name, values in results["results"].items()}


def paper_average(scores: Mapping[str, TaskScore]) -> float | None:
    """The mean of PAPER_TASKS, each by its metric; None where one of them is missing."""
    if not all(name in scores for name in PAPER_TASKS):
        return None
    return float(np.mean([scores[name].metrics[metric] for name, metric in PAPER_TASKS.items()]))


def table(scores: Mapping[str, TaskScore]) -> str:
    """The scores as aligned text, one line for each metric."""
    rows = [("task", "metric", "value", "stderr", "samples")]
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            error = score.errors.get(metric)
            shown = "-" if error is None else f"{error:.4f}"
            rows.append((name, metric, _shown(value), shown, f"{score.samples:,}"))
    average = paper_average(scores)
    if average is not None:
        rows.append((f"mean of {PAPER}", "", f"{average:.4f}", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, metric, *numbers in rows:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), metric.ljust(widths[1]), *aligned]).rstrip())
    return "\n".join(lines)


def _shown(value: float) -> str:
    """A metric as text: an accuracy with four decimals, the perplexity of a fresh model with four digits."""
    return f"{value:.4f}" if abs(value) < 100_000 else f"{value:.4g}"


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or os.sep in name or Path(name).is_dir()


def _folder(name: str, key: str) -> Path:
    """The folder that a path names, or in which the file is.

    Raises:
      UserError: there is nothing, or a file in it is no YAML.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {name}: no such file or folder")
    files = [path] if path.is_file() else sorted(path.rglob("*.yaml"))
    if not files:
        raise UserError(f"{key}: {name}: has no file that ends in .yaml; a task file is one in the harness's format")
    for file in files:
        # The harness passes over what it cannot read.
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{key}: {file}: cannot be read: {first_line(error)}") from error
    return (path.parent if path.is_file() else path).resolve()


def _manager(folders: tuple[str, ...], *, with_own: bool) -> "TaskManager":
    """The harness's index of tasks. That of its own 14,000 takes seconds, and is left out where nothing needs it."""
    from lm_eval.tasks import TaskManager

    if with_own and not folders:
        return _manager_of_names()
    return TaskManager(include_path=list(folders), include_defaults=with_own)


@functools.cache
def _manager_of_names() -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _specs(name: str, manager: "TaskManager", folders: Mapping[str, Path], key: str) -> list[str | dict[str, Any]]:
    """What TaskManager.load takes for one name."""
    if name in folders:
        path = Path(name).expanduser()
        if not path.is_file():
            return _specs_of_folder(name, manager, folders[name], key)
        # The harness reads a file as a task. A group it finds by its name.
        places = {each: manager.task_index[each].yaml_path for each in manager.all_groups}
        groups = [each for each, place in places.items() if place is not None and place.resolve() == path.resolve()]
        return list(groups or [str(path)])
    if name in manager.task_index:
        return [name]
    if name in OWN_TASKS:
        return [dict(OWN_TASKS[name])]
    known = [*manager.all_tasks, PAPER, *OWN_TASKS]
    close = difflib.get_close_matches(name[:60], known, n=1)
    right = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists those that there are"
    raise UserError(f"{key}: {name[:200]}: no such task; {right}")


def _specs_of_folder(name: str, manager: "TaskManager", folder: Path, key: str) -> list[str | dict[str, Any]]:
    """The groups in a folder, and the tasks that are in none of them."""
    entries = {
        each: entry
        for each, entry in manager.task_index.items()
        if entry.yaml_path is not None and entry.yaml_path.resolve().is_relative_to(folder)
    }
    groups = [each for each in entries if each in manager.all_groups]
    grouped: set[str] = set()
    for group in groups:
        grouped |= _members(entries[group].cfg or {})
    found = [each for each in entries if each not in grouped]
    if not found:
        raise UserError(f"{key}: {name}: no file in it has the key `task` or `group`, in the harness's format")
    return list(found)


def _members(group: Mapping[str, Any]) -> set[str]:
    members = group.get("task") or []
    names = [each if isinstance(each, str) else each.get("task") or each.get("group") for each in members]
    return {each for each in names if isinstance(each, str)}


def _load(manager: "TaskManager", specs: list[str | dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """What TaskManager.load gives for all specs, which are loaded one by one, to name the one that fails."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        name = spec if isinstance(spec, str) else spec["task"]
        try:
            found = manager.load([spec])
        except Exception as error:  # whatever a task's own code, its data or the network raise
            raise UserError(f"{key}: {name}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
        for part, entries in found.items():
            loaded[part] |= entries
    return loaded


def _prepare(name: str, task: Any, window: int) -> None:
    """What the harness's command line does to a task; and refuse what this model cannot do."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    for metric, aggregate in task.aggregation().items():
        if aggregate is None:
            raise UserError(f"{name}: metric {metric}: its aggregation is not one that the harness knows")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            check_length(read_options(task.get_config("generation_kwargs") or {}), window)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        _check_metrics(name, task)
    task.set_fewshot_seed(seed=OTHER_SEED)
    try:  # as the harness does with every document, but before anything is computed
        task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # whatever a task's own code raises
        raise UserError(f"{name}: cannot be asked: {type(error).__name__}: {first_line(error)}") from error


def _check_metrics(name: str, task: Any) -> None:
    """Raise UserError for a metric of a task that no function computes, unless the task computes all itself."""
    if task.get_config("process_results") is not None:
        return
    for metric, compute in getattr(task, "_metric_fn_list", {}).items():
        if compute is None:
            raise UserError(f"{name}: metric {metric}: is not one that the harness knows")


def _score(values: Mapping[str, Any]) -> TaskScore:
    """From one entry of the harness's results, whose keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    metrics, errors = {}, {}
    for key, value in values.items():
        name, comma, chosen_by = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        plain = name.removesuffix("_stderr")
        label = plain if chosen_by == "none" else f"{plain},{chosen_by}"
        (metrics if plain == name else errors)[label] = float(value)
    return TaskScore(metrics, errors, int(values.get("sample_len") or 0))


@contextlib.contextmanager
def _harness_settings() -> Iterator[None]:
    """The seeds of the harness's command line; no chatter; no processes forked beside JAX's threads."""
    random_state, numpy_state = random.getstate(), np.random.get_state()
    before = os.environ.get(NO_FORKS)
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    os.environ[NO_FORKS] = "1"
    try:
        with _quiet():
            yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        if before is None:
            del os.environ[NO_FORKS]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No lines for people who debug a task, and progress bars only on a terminal, of one process.

    Standard output stays free for the scores: what a task's own code prints goes to standard error.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task

    logger, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    resample = lm_eval.api.metrics.bootstrap_stderr
    level, shows_bars = logger.level, can_redraw(sys.stderr) and jax.process_index() == 0
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bars, disable=not shows_bars, leave=False)
    lm_eval.api.metrics.bootstrap_stderr = functools.partial(_in_silence, resample)
    if not shows_bars:
        datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bars
        lm_eval.api.metrics.bootstrap_stderr = resample


def _in_silence(resample: Callable[..., float], *arguments: Any, **keys: Any) -> float:
    """What the harness's resampling returns. It prints the metric's name and a bar, and sklearn warns each time."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return resample(*arguments, **keys)
