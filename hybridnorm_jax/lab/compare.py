"""Train the runs of a comparison on the same data, in one directory."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import check
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.lab.compare_options import (
    Comparison,
    Contestant,
    check_budget,
    run_config,
    with_steps,
)
from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.groups import RunGroup, compared_set
from hybridnorm_jax.lab.labels import measured_otherwise
from hybridnorm_jax.lab.pairing import PairingRecord, check_paired
from hybridnorm_jax.lab.run_data import RunData, check_same_data, read_data
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, compile_seconds, read_losses, read_object, read_result
from hybridnorm_jax.lab.runs import check_addition
from hybridnorm_jax.lab.sweep import Swept, sweep
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training.arithmetic import operations
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError
from hybridnorm_jax.training.huggingface_beginning import is_huggingface
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program, compiled_values
from hybridnorm_jax.training.run_directory import run_directory
from hybridnorm_jax.training.run_identity import check_same_run, saved_run
from hybridnorm_jax.training.shared_programs import SharedPrograms
from hybridnorm_jax.training.step_directories import absolute, check_place, find_checkpoint
from hybridnorm_jax.whole_files import is_local, write_whole


class Ended(NamedTuple):
    """A run that ended: its configuration, and the content of its result.json."""

    config: RunConfig
    result: dict[str, Any]


def compare(asked: Comparison, only: int | None = None) -> list[Ended]:
    """Train what has no result yet, one run after another.

    A run that was stopped or killed goes on from its newest checkpoint. One that diverges is a result.

    Args:
      only: number of the one part to train; each job of a cluster trains one. None: all.

    Returns:
      Every run that was asked for, by contestant; with a sweep those of the sweep before the others.

    Raises:
      UserError: runs of other comparisons in the directory cannot be compared with these; nothing was trained.
      UserError, RunStopped: those of training.loop.train; the runs that finished before stay.
    """
    parts = asked.parts
    check(only is None or 0 <= only < parts, "--only", only, f"must be in [0, {parts}), there are {parts} combinations")
    file = epath.Path(asked.directory) / "comparison.json"
    # What cannot be read or written is refused before anything is written.
    check_place(absolute(asked.directory))
    configs = asked.configs
    init_from = configs[0].init_from
    if init_from is not None and not is_huggingface(init_from):
        find_checkpoint(init_from)
    data = read_data(configs[0])
    _check_validated(asked)
    asked = with_budget(asked)
    if is_local(asked.directory):
        check_addition(Path(asked.directory), asked.configs, data, asked.command)
    trainer = _Trainer(asked, data)
    with _gone_if_nothing_follows(file):
        _write(file, _described(asked, file))
        if asked.options.sweep:
            chosen = asked.contestants if only is None else [asked.contestants[only]]
            return [ended for contestant in chosen for ended in trainer.sweep_and_train(contestant)]
        numbers = range(parts) if only is None else [only]
        return [trainer.train(asked.configs[number], number, f"{number + 1} of {parts}") for number in numbers]


def with_budget(asked: Comparison) -> Comparison:
    """The comparison with the steps that its budget of operations is worth for each contestant; the same without one.

    Raises:
      ConfigError: the budget is not worth the warm-up.
    """
    flops = asked.options.flops
    if flops is None:
        return asked
    contestants = []
    for contestant in asked.contestants:
        contestant = with_steps(contestant, max(1, round(flops / step_operations(contestant.config))))
        check_budget(contestant.config)
        contestants.append(contestant)
    return dataclasses.replace(asked, contestants=tuple(contestants))


def step_operations(config: RunConfig) -> int:
    """Arithmetic operations of one training step over all devices, as training/arithmetic.py counts.

    Attention is counted as `xla` computes it, whatever computes it: all scores of a sequence, also those that are
    masked.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla", remat="none"))
    return operations(Program(plain).trace_train_step().jaxpr.jaxpr)


def _check_validated(asked: Comparison) -> None:
    """Raise ConfigError for a sweep without anything to choose by."""
    section = asked.configs[0].data
    right = "needs a validation set to choose by: data.validation_fraction or data.validation"
    check(not asked.options.sweep or bool(section.validation_fraction or section.validation), "sweep", "[...]", right)


@contextlib.contextmanager
def _gone_if_nothing_follows(file: epath.Path) -> Iterator[None]:
    """Remove the file of a comparison that is new, and whose first run was refused before it wrote anything."""
    is_new = not file.exists()
    try:
        yield
    except UserError:
        if is_new and jax.process_index() == 0 and list(file.parent.iterdir()) == [file]:
            file.unlink()
            with contextlib.suppress(OSError):
                file.parent.rmdir()
        raise


class _Trainer:
    """Trains the runs of a comparison in one process, and remembers what the next ones can use."""

    def __init__(self, asked: Comparison, data: RunData):
        self._asked, self._data = asked, data
        self._programs = SharedPrograms()
        self._operations: dict[str, int] = {}
        self._first_of_seed: dict[int, RunConfig] = {}

    def sweep_and_train(self, contestant: Contestant) -> list[Ended]:
        """The runs of the search for the contestant's rate, and those of all seeds at that rate."""
        asked, runs = self._asked, []
        number = asked.contestants.index(contestant)

        def ended(rate: float, seed: int, what: str) -> Ended:
            config = run_config(contestant, asked.directory, rate=rate, seed=seed)
            runs.append(self.train(config, number, f"{number + 1} of {asked.parts}, {what}"))
            return runs[-1]

        def group_at(rate: float) -> RunGroup:
            return group_of([ended(rate, seed, "sweep") for seed in asked.options.sweep_seeds])

        found = sweep(asked.options.sweep, group_at)
        say(f"\n{contestant.name}: {_found_text(found)}")
        if found.best is not None:
            for seed in asked.options.seeds:
                ended(found.best, seed, f"learning rate {found.best:g}")
        return runs

    def train(self, config: RunConfig, number: int, place: str) -> Ended:
        """One run, which is trained unless it has a result.

        Args:
          number: of the part that it belongs to.
          place: which it is, for the line that is printed.
        """
        say(f"\n== {place}: {config.run.name}")
        directory = epath.Path(config.run.dir) / config.run.name
        if (directory / "result.json").exists():
            result = _earlier(directory / "result.json", config, self._data)
            say(f"{result['status']} before")
        else:
            result = self._trained(config, number)
        pair = self._first_of_seed.setdefault(config.train.seed, config), config
        check_paired(
            [epath.Path(each.run.dir) / each.run.name for each in pair],
            precision=max(float(jnp.finfo(each.model.param_dtype).eps) for each in pair),
        )
        return Ended(config, result)

    def _trained(self, config: RunConfig, number: int) -> dict[str, Any]:
        directory = run_directory(config)
        _check_ended_alike(directory, config)
        with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
            first = saved.latest() or 0
        began = time.perf_counter()
        ended = _train(config, directory, began, self._programs)
        result = {
            "status": FINISHED if ended.diverged_at is None else DIVERGED,
            "step": ended.step,
            "diverged_at": ended.diverged_at,
            "scores": ended.scores,
            "train_tokens": self._data.train_tokens,
            "data": self._data.files,
            "tokens": ended.step * config.tokens_per_step,
            "flops_per_step": self._operations_of(config),
            "seconds": round(time.perf_counter() - began, 1),
            "compile_seconds": compile_seconds(read_records(directory)),
            "resumed_from": first,
            "command": f"{self._asked.command} --only={number}",
            "hardware": hardware(),
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
        }
        _write(directory / "result.json", result)
        label = "" if result["status"] == DIVERGED else "loss "
        say(f"{label}{_cell(result)} in {duration(result['seconds'])}")
        return result

    def _operations_of(self, config: RunConfig) -> int | None:
        """Operations of a step, counted once for each structure; None where they cannot be counted."""
        key = repr(compiled_values(config))
        if key not in self._operations:
            try:
                self._operations[key] = step_operations(config)
            except UserError:
                return None
        return self._operations[key]


def group_of(ended: Sequence[Ended]) -> RunGroup:
    """Runs of one contestant at one rate, by their final losses."""
    finished = [set(each.result["scores"]) for each in ended if each.result["status"] == FINISHED]
    measured = compared_set(finished)
    losses, diverged = {}, {}
    for config, result in ended:
        if result["status"] == FINISHED:
            losses[config.train.seed] = result["scores"][measured]["loss"]
        else:
            diverged[config.train.seed] = result["diverged_at"]
    return RunGroup(losses=losses, diverged=diverged, unfinished=())


def _found_text(found: Swept) -> str:
    if found.best is None:
        return "no run of the sweep finished, so no seed is trained"
    text = f"of the learning rates {', '.join(f'{rate:g}' for rate in found.tried)} the best is {found.best:g}"
    return text if found.edge is None else f"{text}, the {found.edge} that was tried"


@dataclasses.dataclass(frozen=True)
class _Ended:
    """How a training run ended.

    Attributes:
      step: how many steps it made.
      diverged_at: the step at which it diverged; None: it finished.
      scores: validation set -> its Score as JSON has it.
    """

    step: int
    diverged_at: int | None
    scores: dict[str, dict[str, Any]]


def _train(config: RunConfig, directory: epath.Path, began: float, programs: SharedPrograms) -> _Ended:
    try:
        # The first run of a structure says what all of them are.
        final = train(config, began=began, hooks=[PairingRecord()], programs=programs, brief=programs.has(config))
    except DivergedError as error:
        say(f"diverged: {error}")
        return _Ended(step=error.step, diverged_at=error.step, scores={})
    scores = {name: score.as_json() for name, score in final.items()}
    last = config.train.steps
    diverged_at = rising_since(read_losses(directory))
    if diverged_at is not None:
        say(f"diverged: the loss was lowest at step {diverged_at}")
    elif any(score["loss"] is None for score in scores.values()):
        say("diverged: the final loss is not finite")
        diverged_at = last
    return _Ended(step=last, diverged_at=diverged_at, scores=scores)


def _earlier(file: epath.Path, config: RunConfig, data: RunData) -> dict[str, Any]:
    """The result of a run that ended before.

    Raises:
      ConfigError: its configuration, one of its plugins or its data are others. Its files stay as they are.
    """
    check_same_run(file.parent, config)
    saved = saved_run(file.parent)
    if saved is None:
        raise ConfigError(f"{file}: lies beside no config.yaml and no checkpoints; choose another run.name")
    _check_measured_alike(file.parent, saved.config, config)
    result = read_result(file)
    check_same_data(result, data, file=file)
    return result


def _check_ended_alike(directory: epath.Path, config: RunConfig) -> None:
    """Refuse other keys for a run that was killed between its last step and its result: no checkpoint would hold them.

    Raises:
      ConfigError: names the keys.
    """
    saved = saved_run(directory)
    if saved is not None and saved.step == config.train.steps:
        _check_measured_alike(directory, saved.config, config)


def _check_measured_alike(directory: epath.Path, saved: RunConfig, config: RunConfig) -> None:
    if different := measured_otherwise(saved, config):
        raise ConfigError(f"{directory} holds another run ({'; '.join(different)}): choose another run.name")


def _described(asked: Comparison, file: epath.Path) -> dict[str, Any]:
    """What comparison.json says. Commands that asked for other combinations before stay in it."""
    rates = [] if asked.options.sweep else sorted({config.optimizer.learning_rate for config in asked.configs})
    before = read_object(file).get("commands", []) if file.exists() else []
    commands = list(dict.fromkeys([*before, asked.command]))
    return {"commands": commands, **dataclasses.asdict(asked.options), "learning_rates": rates}


def hardware() -> str:
    """The devices as text, such as "1 x cpu (AMD EPYC 7B13, 2 cores)"."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"cpu ({_cpu_model()}, {os.cpu_count()} cores)"
    return f"{jax.device_count()} x {kind}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def _write(file: epath.Path, value: dict[str, Any]) -> None:
    """A JSON file, whole or not at all, by one process of all."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of one comparison write comparison.json at the same time.
        write_whole(file, json.dumps(value, indent=2) + "\n", concurrent=True)


def table(asked: Comparison, runs: Sequence[Ended]) -> str:
    """The final loss of every run, in nats per token of the first validation set.

    A line holds the seeds of one contestant and learning rate; after a sweep, those at the rate that it found.
    """
    seeds = asked.options.seeds
    cells: dict[tuple[str, float], dict[int, str]] = {}
    for config, result in runs:
        if config.train.seed in seeds:
            row = config.run.name.partition("-lr")[0], config.optimizer.learning_rate
            cells.setdefault(row, {})[config.train.seed] = _cell(result)
    headings = "".join(f"{f'seed {seed}':>14}" for seed in seeds)
    lines = [f"{'scheme':20}{'learning rate':>14}{headings}"]
    for (name, rate), by_seed in cells.items():
        lines.append(f"{name:20}{rate:>14g}" + "".join(f"{by_seed.get(seed, ''):>14}" for seed in seeds))
    return "\n".join(lines)


def _cell(result: dict[str, Any]) -> str:
    """The loss of a run on its first validation set, or how else it ended."""
    if result["status"] == DIVERGED:
        return f"diverged {result['diverged_at']}"
    losses = [score["loss"] for score in result["scores"].values()]
    return f"{losses[0]:.4f}" if losses else "finished"
