"""Train every combination of scheme, learning rate and seed on the same data, in one directory."""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_values import show
from hybridnorm_jax.config.run_config import LARGEST_RATE, LARGEST_SEED, SMALLEST, RunConfig
from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.labels import measured_otherwise
from hybridnorm_jax.lab.run_data import RunData, check_same_data, read_data
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, read_losses, read_object, read_result
from hybridnorm_jax.lab.runs import check_addition
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError
from hybridnorm_jax.training.huggingface_beginning import is_huggingface
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.run_directory import run_directory
from hybridnorm_jax.training.run_identity import check_same_run, saved_run
from hybridnorm_jax.training.step_directories import absolute, check_place, find_checkpoint
from hybridnorm_jax.whole_files import expanded, is_local, write_whole

DEFAULT = "lab"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What is combined."""

    schemes: tuple[str, ...] = key(("pre", "post", "hybrid", "hybrid_star", "span", "peri"), "norm placements")
    seeds: tuple[int, ...] = key(
        (0, 1, 2),
        "values of train.seed; train.data_seed, the same for all, decides the order of the data",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    learning_rates: tuple[float, ...] = key(
        (), "peak learning rates; none: that of the configuration", at_least=SMALLEST, at_most=LARGEST_RATE
    )

    def __post_init__(self) -> None:
        check_fields("", self)
        for name, values in dataclasses.asdict(self).items():
            check(bool(values) or name == "learning_rates", name, "[]", "at least one is needed")
            check(len(set(values)) == len(values), name, show(values), "one of them is named twice")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A directory of runs that differ in scheme, learning rate and seed.

    Attributes:
      directory: run.dir/run.name of the arguments; run.name=auto stands for compare-<its name>.
      arguments: those of `hybridnorm lab compare` that ask for it.
      options: what is combined.
      configs: one for each combination, by scheme, then learning rate, then seed.
    """

    directory: str
    arguments: tuple[str, ...]
    options: CompareOptions
    configs: tuple[RunConfig, ...]

    @property
    def command(self) -> str:
        """The command that asks for it, as it is typed."""
        return shlex.join(["hybridnorm", "lab", "compare", *self.arguments])


def comparison(arguments: Sequence[str]) -> Comparison:
    """The comparison that `[CONFIG ...] [schemes=...] [seeds=...] [learning_rates=...] [key=value ...]` asks for.

    Raises:
      ConfigError: one line, before anything is trained: an argument is wrong, or a combination of values is.
    """
    options, others = take(CompareOptions, arguments)
    lab_keys = {"model.scheme": "schemes", "train.seed": "seeds"}
    if options.learning_rates:
        lab_keys["optimizer.learning_rate"] = "learning_rates"
    refuse(others, lab_keys)
    base = parse(others, DEFAULT)  # imports plugins, which may bring schemes
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    is_named = any(argument.startswith("run.name=") for argument in others)
    name = base.run.name if is_named else f"compare-{base.run.name}"
    directory = f"{expanded(base.run.dir)}/{name}"
    rates = options.learning_rates or (base.optimizer.learning_rate,)
    configs = [
        _config(base, directory, scheme=scheme, rate=rate, seed=seed)
        for scheme, rate, seed in itertools.product(options.schemes, rates, options.seeds)
    ]
    return Comparison(directory=directory, arguments=tuple(arguments), options=options, configs=tuple(configs))


def refuse(arguments: Sequence[str], lab_keys: Mapping[str, str]) -> None:
    """Raise ConfigError for an argument that sets a key which the lab sets itself.

    Args:
      lab_keys: key of a run -> key of the lab that sets it.
    """
    for argument in arguments:
        lab_key = lab_keys.get(argument.partition("=")[0])
        if lab_key is not None:
            raise ConfigError(f"{argument}: {lab_key}=[...] sets it here")


def _config(base: RunConfig, directory: str, *, scheme: str, rate: float, seed: int) -> RunConfig:
    data_seed = 0 if base.train.data_seed is None else base.train.data_seed
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, dir=directory, name=f"{scheme}-lr{rate:g}-seed{seed}"),
        model=base.model.with_scheme(scheme),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed, data_seed=data_seed),
    )


def compare(asked: Comparison, only: int | None = None) -> list[dict[str, Any]]:
    """Train what has no result yet, one run after another.

    A run that was stopped or killed goes on from its newest checkpoint. One that diverges is a result.

    Args:
      only: number of the one combination to train; each job of a cluster trains one. None: all.

    Returns:
      The content of result.json, for every combination that was asked for.

    Raises:
      UserError: runs of other comparisons in the directory cannot be compared with these; nothing was trained.
      UserError, RunStopped: those of training.loop.train; the runs that finished before stay.
    """
    count = len(asked.configs)
    right = f"must be in [0, {count}), there are {count} combinations"
    check(only is None or 0 <= only < count, "--only", only, right)
    file = epath.Path(asked.directory) / "comparison.json"
    # What cannot be read or written is refused before anything is written.
    check_place(absolute(asked.directory))
    init_from = asked.configs[0].init_from
    if init_from is not None and not is_huggingface(init_from):
        find_checkpoint(init_from)
    data = read_data(asked.configs[0])
    if is_local(asked.directory):
        check_addition(Path(asked.directory), asked.configs, data)
    results = []
    with _gone_if_nothing_follows(file):
        _write(file, _described(asked, file))
        for number, config in enumerate(asked.configs):
            if only is None or number == only:
                say(f"\n== {number + 1} of {count}: {config.run.name}")
                results.append(_result(asked, number, config, data))
    return results


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


def _result(asked: Comparison, number: int, config: RunConfig, data: RunData) -> dict[str, Any]:
    """The result of one combination, which is trained unless it has one."""
    file = epath.Path(config.run.dir) / config.run.name / "result.json"
    if file.exists():
        result = _earlier(file, config, data)
        say(f"{result['status']} before")
        return result
    directory = run_directory(config)
    _check_ended_alike(directory, config)
    with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
        first = saved.latest() or 0
    began = time.perf_counter()
    ended = _train(config, directory, began)
    # Each run compiles its own steps, which nothing uses again.
    jax.clear_caches()
    result = {
        "status": FINISHED if ended.diverged_at is None else DIVERGED,
        "step": ended.step,
        "diverged_at": ended.diverged_at,
        "scores": ended.scores,
        "train_tokens": data.train_tokens,
        "data": data.files,
        "tokens": ended.step * config.tokens_per_step,
        "seconds": round(time.perf_counter() - began, 1),
        "resumed_from": first,
        "command": f"{asked.command} --only={number}",
        "hardware": hardware(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    _write(file, result)
    return result


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


def _train(config: RunConfig, directory: epath.Path, began: float) -> _Ended:
    try:
        scores = {name: score.as_json() for name, score in train(config, began=began).items()}
    except DivergedError as error:
        say(f"diverged: {error}")
        return _Ended(step=error.step, diverged_at=error.step, scores={})
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
    rates = sorted({config.optimizer.learning_rate for config in asked.configs})
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


def table(asked: Comparison, results: Sequence[dict[str, Any]]) -> str:
    """The final loss of every run, in nats per token of the first validation set.

    A line holds the seeds of one scheme and learning rate.

    Args:
      results: one for each of asked.configs.
    """
    seeds = asked.options.seeds
    headings = "".join(f"{f'seed {seed}':>14}" for seed in seeds)
    lines = [f"{'scheme':20}{'learning rate':>14}{headings}"]
    for start in range(0, len(results), len(seeds)):
        config = asked.configs[start]
        cells = "".join(f"{_cell(result):>14}" for result in results[start : start + len(seeds)])
        lines.append(f"{config.model.scheme:20}{config.optimizer.learning_rate:>14g}{cells}")
    return "\n".join(lines)


def _cell(result: dict[str, Any]) -> str:
    if result["status"] == DIVERGED:
        return f"diverged {result['diverged_at']}"
    losses = [score["loss"] for score in result["scores"].values()]
    return f"{losses[0]:.4f}" if losses else "finished"
