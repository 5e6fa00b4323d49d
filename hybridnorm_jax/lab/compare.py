"""Train every combination of scheme, learning rate and seed on the same data, in one directory."""

import dataclasses
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.resumption import differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.values import show
from hybridnorm_jax.config.yaml_files import from_yaml, take
from hybridnorm_jax.data import open_data
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.fields import check, check_choice, key
from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.runs import DIVERGED, FINISHED, measured_otherwise, read_losses, read_object, read_result
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.loop import open_run_directory, train
from hybridnorm_jax.training.step_log import DivergedError

DEFAULT = "lab"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What is combined."""

    schemes: tuple[str, ...] = key(("pre", "post", "hybrid", "hybrid_star", "span", "peri"), "norm placements")
    seeds: tuple[int, ...] = key((0, 1, 2), "train.seed of each; the data order is that of train.data_seed for all")
    learning_rates: tuple[float, ...] = key((), "peak learning rates; none: that of the configuration")

    def __post_init__(self):
        for name, values in dataclasses.asdict(self).items():
            check(bool(values) or name == "learning_rates", name, "[]", "at least one is needed")
            check(len(set(values)) == len(values), name, show(values), "one of them is named twice")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A directory of runs that differ in scheme, learning rate and seed.

    Attributes:
      directory: run.dir/run.name of the words; run.name=auto stands for compare-<its name>.
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
        """What asks for it, as it is typed."""
        return shlex.join(["hybridnorm", "lab", "compare", *self.arguments])


def comparison(words: Sequence[str]) -> Comparison:
    """The comparison that `[FILE.yaml ...] [schemes=...] [seeds=...] [learning_rates=...] [key=value ...]` asks for.

    Raises:
      ConfigError: one line, before anything is trained: a word is wrong, or one of the combinations cannot be.
    """
    options, others = take(CompareOptions, words)
    instead = {"model.scheme": "schemes", "train.seed": "seeds"}
    refuse(others, instead | ({"optimizer.learning_rate": "learning_rates"} if options.learning_rates else {}))
    base = parse(others, DEFAULT)  # imports plugins, which may bring schemes
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    named = any(word.startswith("run.name=") for word in others)
    directory = f"{base.run.dir}/{base.run.name if named else f'compare-{base.run.name}'}"
    rates = options.learning_rates or (base.optimizer.learning_rate,)
    order = 0 if base.train.data_seed is None else base.train.data_seed
    configs = [
        _config(base, directory, order, *combination)
        for combination in itertools.product(options.schemes, rates, options.seeds)
    ]
    return Comparison(directory, tuple(words), options, tuple(configs))


def refuse(words: Sequence[str], instead: Mapping[str, str]) -> None:
    """Raise ConfigError for a word whose key would be set to something else: {key: the lab's own}."""
    for word in words:
        own = instead.get(word.partition("=")[0])
        if own is not None:
            raise ConfigError(f"{word}: {own}=[...] sets it here")


def _config(base: RunConfig, directory: str, data_seed: int, scheme: str, rate: float, seed: int) -> RunConfig:
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, dir=directory, name=f"{scheme}-lr{rate:g}-seed{seed}"),
        model=dataclasses.replace(base.model, scheme=scheme),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed, data_seed=data_seed),
    )


def compare(asked: Comparison, only: int | None = None) -> list[dict[str, Any]]:
    """Train what has no result yet, one after another; returns every combination's result.json.

    A run that was stopped or killed goes on from its newest checkpoint. One that diverges is a result.

    Args:
      only: number of the one combination to train, as separate jobs do.

    Raises:
      UserError, RunStopped: as training.loop.train; what is finished stays.
    """
    count = len(asked.configs)
    right = f"must be in [0, {count}), there are {count} combinations"
    check(only is None or 0 <= only < count, "--only", only, right)
    file = epath.Path(asked.directory) / "comparison.json"
    _write(file, _described(asked, file))
    results = []
    for number, config in enumerate(asked.configs):
        if only in (None, number):
            _say(f"\n== {number + 1} of {count}: {config.run.name}")
            results.append(_result(asked, number, config))
    return results


def _result(asked: Comparison, number: int, config: RunConfig) -> dict[str, Any]:
    """Of one combination, trained unless it is there."""
    file = epath.Path(config.run.dir) / config.run.name / "result.json"
    if file.exists():
        result = _earlier(file, config)
        _say(f"{result['status']} before")
        return result
    directory = open_run_directory(config)
    with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
        first = saved.latest() or 0
    began = time.perf_counter()
    status, step, where, scores = FINISHED, config.train.steps, None, {}
    try:
        scores = {name: _plain(score) for name, score in train(config, began=began).items()}
    except DivergedError as error:
        _say(f"diverged: {error}")
        status, step, where = DIVERGED, error.step, error.step
    # Each run compiles its own steps, which nothing uses again.
    jax.clear_caches()
    if status == FINISHED and (where := rising_since(read_losses(directory))) is not None:
        _say(f"diverged: the loss was lowest at step {where}")
        status = DIVERGED
    if status == FINISHED and any(score["loss"] is None for score in scores.values()):
        _say("diverged: the final loss is not finite")
        status, where = DIVERGED, step
    result = {
        "status": status,
        "step": step,
        "diverged_at": where,
        "scores": scores,
        "train_tokens": _train_tokens(config),
        "tokens": step * config.tokens_per_step,
        "seconds": round(time.perf_counter() - began, 1),
        "resumed_from": first,
        "command": f"{asked.command} --only={number}",
        "hardware": hardware(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    _write(file, result)
    return result


def _earlier(file: epath.Path, config: RunConfig) -> dict[str, Any]:
    """The result of a run that ended, which had the same configuration; its config.yaml stays, checkpoints or not."""
    saved_file = file.parent / "config.yaml"
    saved = from_yaml(saved_file.read_text(), origin=str(saved_file))
    if odd := differences(saved, config) or measured_otherwise(saved, config):
        raise ConfigError(f"{file.parent} holds another run ({'; '.join(odd)}): choose another run.name")
    return read_result(file)


def _plain(score: Score) -> dict[str, Any]:
    """As JSON has it: null for what is not finite."""
    values = dataclasses.asdict(score)
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


def _train_tokens(config: RunConfig) -> int:
    sizes = {"seq_len": config.train.seq_len, "vocab_size": config.model.vocab_size}
    return open_data(config.data, progress=False, **sizes).train.num_tokens


def _described(asked: Comparison, file: epath.Path) -> dict[str, Any]:
    """What comparison.json says; commands of before, which asked for other combinations, stay."""
    rates = sorted({config.optimizer.learning_rate for config in asked.configs})
    before = read_object(file).get("commands", []) if file.exists() else []
    commands = list(dict.fromkeys([*before, asked.command]))
    return {"commands": commands, **dataclasses.asdict(asked.options), "learning_rates": rates}


def hardware() -> str:
    """The devices in words, such as "1 x cpu (AMD EPYC 7B13, 2 cores)"."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
        kind = f"cpu ({model[1] if model else platform.processor()}, {os.cpu_count()} cores)"
    return f"{jax.device_count()} x {kind}"


def _write(file: epath.Path, value: dict[str, Any]) -> None:
    """A JSON file, whole or not at all, by one process of all."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of one comparison write comparison.json at the same time.
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(file)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def table(asked: Comparison, results: Sequence[dict[str, Any]]) -> str:
    """Final loss (nats per token, of the first validation set) of every run: a line for scheme and learning rate."""
    seeds = asked.options.seeds
    lines = ["".join([f"{'scheme':20}{'learning rate':>14}", *(f"{f'seed {seed}':>14}" for seed in seeds)])]
    for start in range(0, len(results), len(seeds)):
        config = asked.configs[start]
        cells = [f"{config.model.scheme:20}{config.optimizer.learning_rate:>14g}"]
        cells += [f"{_cell(result):>14}" for result in results[start : start + len(seeds)]]
        lines.append("".join(cells))
    return "\n".join(lines)


def _cell(result: dict[str, Any]) -> str:
    if result["status"] == DIVERGED:
        return f"diverged {result['diverged_at']}"
    losses = [score["loss"] for score in result["scores"].values()]
    return f"{losses[0]:.4f}" if losses else "finished"
