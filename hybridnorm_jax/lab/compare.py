"""Train the runs of a comparison on the same data, in one directory."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from hybridnorm_jax.config_fields import check
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.compare_options import Comparison, check_budget, with_steps
from hybridnorm_jax.lab.run_data import read_data
from hybridnorm_jax.lab.run_files import read_comparison, write_object
from hybridnorm_jax.lab.run_results import Ended, outcome_text
from hybridnorm_jax.lab.runs import check_addition
from hybridnorm_jax.lab.together import check_can_be_together
from hybridnorm_jax.lab.trainer import Part, Trainer, step_operations
from hybridnorm_jax.training.huggingface_beginning import is_huggingface
from hybridnorm_jax.training.step_directories import absolute, check_place, find_checkpoint
from hybridnorm_jax.whole_files import is_local


def compare(asked: Comparison, only: int | None = None) -> list[Ended]:
    """Train what has no result yet, one run after another or, with `together`, several at once.

    A run that was stopped or killed goes on from its newest checkpoint; those that were trained at once have none and
    begin again. A run that diverges is a result.

    Args:
      only: number of the one part to train; each job of a cluster trains one. None: all.

    Returns:
      Every run that was asked for, by contestant; with a sweep those of the sweep before the others.

    Raises:
      UserError: runs of other comparisons in the directory cannot be compared with these; nothing was trained.
      UserError, RunStopped: those of training.loop.train; the runs that finished before stay.
    """
    parts = asked.parts
    things = "schemes, each with its search" if asked.options.sweep else "combinations"
    check(only is None or 0 <= only < parts, "--only", only, f"must be in [0, {parts}), there are {parts} {things}")
    for contestant in asked.contestants:
        check_can_be_together(contestant.config, asked.options.together)
    file = epath.Path(asked.directory) / "comparison.json"
    # What cannot be read or written is refused before anything is written.
    check_place(absolute(asked.directory))
    configs = asked.configs
    init_from = configs[0].init_from
    if init_from is not None and not is_huggingface(init_from):
        find_checkpoint(init_from)
    data = read_data(configs[0])
    asked = with_budget(asked)
    if is_local(asked.directory):
        check_addition(Path(asked.directory), asked.configs, data, asked.command, asked.options.flops)
    trainer = Trainer(asked, data)
    with _gone_if_nothing_follows(file):
        write_object(file, _described(asked, file))
        if asked.options.sweep:
            chosen = asked.contestants if only is None else [asked.contestants[only]]
            return [ended for contestant in chosen for ended in trainer.sweep_and_train(contestant)]
        return [ended for of_contestant in _by_contestant(asked, only) for ended in trainer.train(of_contestant)]


def _by_contestant(asked: Comparison, only: int | None) -> Iterator[list[Part]]:
    """The parts of a comparison without a sweep, or the one that is asked for."""
    parts = asked.parts
    numbered = [Part(config, number, f"{number + 1} of {parts}") for number, config in enumerate(asked.configs)]
    of_each = parts // len(asked.contestants)
    for first in range(0, parts, of_each):
        chosen = [part for part in numbered[first : first + of_each] if only in (None, part.number)]
        if chosen:
            yield chosen


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


def _described(asked: Comparison, file: epath.Path) -> dict[str, Any]:
    """What comparison.json says. Commands that asked for other combinations before stay in it."""
    rates = [] if asked.options.sweep else sorted({config.optimizer.learning_rate for config in asked.configs})
    before = read_comparison(file).get("commands", [])
    commands = list(dict.fromkeys([*before, asked.command]))
    return {"commands": commands, **dataclasses.asdict(asked.options), "learning_rates": rates}


def table(asked: Comparison, runs: Sequence[Ended]) -> str:
    """The final loss of every run, in nats per token of the first validation set.

    A line holds the seeds of one contestant and learning rate; after a sweep, those at the rate that it found.
    """
    seeds = asked.options.seeds
    cells: dict[tuple[str, float], dict[int, str]] = {}
    for config, result in runs:
        if config.train.seed in seeds:
            row = config.run.name.rpartition("-lr")[0], config.optimizer.learning_rate
            cells.setdefault(row, {})[config.train.seed] = outcome_text(result)
    headings = "".join(f"{f'seed {seed}':>14}" for seed in seeds)
    width = max(20, *(len(name) + 2 for name, _ in cells)) if cells else 20
    lines = [f"{'scheme':{width}}{'learning rate':>14}{headings}"]
    for (name, rate), by_seed in cells.items():
        lines.append(f"{name:{width}}{rate:>14g}" + "".join(f"{by_seed.get(seed, ''):>14}" for seed in seeds))
    return "\n".join(lines)
