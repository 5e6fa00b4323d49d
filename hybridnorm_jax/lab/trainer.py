"""Trains the runs of a comparison that have no result yet, one after another or several at once."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.compare_options import Comparison, Contestant, run_config
from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.pairing import PairingRecord, check_paired, read_record
from hybridnorm_jax.lab.run_data import RunData
from hybridnorm_jax.lab.run_files import DIVERGED, write_object
from hybridnorm_jax.lab.run_results import (
    Ended,
    Outcome,
    check_ended_alike,
    earlier_result,
    group_of,
    outcome_text,
    result_of,
)
from hybridnorm_jax.lab.sweep import Swept, sweep
from hybridnorm_jax.lab.together import train_together
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training.arithmetic import operations
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.program import Program, compiled_values
from hybridnorm_jax.training.run_directory import run_directory
from hybridnorm_jax.training.run_identity import saved_run
from hybridnorm_jax.training.shared_programs import SharedPrograms


class Part(NamedTuple):
    """A run to train.

    Attributes:
      config: of the run.
      number: of the part of the comparison that it belongs to, as --only counts.
      place: which it is, for the line that is printed.
    """

    config: RunConfig
    number: int
    place: str


class Trainer:
    """Trains the runs of a comparison in one process, and remembers what the next ones can use."""

    def __init__(self, asked: Comparison, data: RunData):
        self._asked, self._data = asked, data
        self._programs = SharedPrograms()
        self._operations: dict[str, int | None] = {}
        self._first_of_seed: dict[int, RunConfig] = {}

    def sweep_and_train(self, contestant: Contestant) -> list[Ended]:
        """The runs of the search for the contestant's rate, and those of all seeds at that rate."""
        asked = self._asked
        number = asked.contestants.index(contestant)
        runs: list[Ended] = []

        def trained(rates: Sequence[float], seeds: Sequence[int], what: str) -> list[Ended]:
            place = f"{number + 1} of {asked.parts}, {what}"
            configs = [
                run_config(contestant, asked.directory, rate=rate, seed=seed) for rate in rates for seed in seeds
            ]
            ended = self.train([Part(config, number, place) for config in configs])
            runs.extend(ended)
            return ended

        def groups_at(rates: Sequence[float]) -> list[RunGroup]:
            ended = trained(rates, asked.options.sweep_seeds, "sweep")
            return [group_of([each for each in ended if each.rate == rate]) for rate in rates]

        found = sweep(asked.options.sweep, groups_at)
        say(f"\n{contestant.name}: {_found_text(found)}")
        if found.best is not None:
            trained([found.best], asked.options.seeds, f"learning rate {found.best:g}")
        return runs

    def train(self, parts: Sequence[Part]) -> list[Ended]:
        """Runs of one contestant, which are trained unless they have a result; in their order."""
        ended = {}
        for group in self._groups(parts):
            for each in self._trained_alone(group[0]) if len(group) == 1 else self._trained_together(group):
                ended[each.config.run.name] = each
        return [ended[part.config.run.name] for part in parts]

    def _groups(self, parts: Sequence[Part]) -> list[list[Part]]:
        """What is trained at once: new runs. One that has a result, or a checkpoint to go on from, is for itself."""
        most = self._asked.options.together
        alone, new = [], []
        for part in parts:
            if most == 1 or not _is_new(part.config):
                alone.append([part])
            else:
                new.append(part)
        return alone + [new[first : first + most] for first in range(0, len(new), most)]

    def _trained_alone(self, part: Part) -> list[Ended]:
        config = part.config
        say(f"\n== {part.place}: {config.run.name}")
        directory = run_directory(config)
        if (directory / "result.json").exists():
            result = earlier_result(directory / "result.json", config, self._data)
            say(f"{result['status']} before")
            return [self._paired(config, result)]
        check_ended_alike(directory, config)
        with Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as saved:
            first = saved.latest() or 0
        began = time.perf_counter()
        outcome: Outcome
        try:
            # The first run of a structure says what all of them are.
            is_known = self._programs.has(config)
            outcome = train(config, began=began, hooks=[PairingRecord()], programs=self._programs, brief=is_known)
        except DivergedError as error:
            outcome = error
        return [self._recorded(part, outcome, seconds=time.perf_counter() - began, first=first)]

    def _trained_together(self, group: Sequence[Part]) -> list[Ended]:
        places = dict.fromkeys([group[0].place, group[-1].place])
        names = ", ".join(part.config.run.name for part in group)
        say(f"\n== {' to '.join(places)}: {names}")
        began = time.perf_counter()
        outcomes = train_together([part.config for part in group], began=began, programs=self._programs)
        seconds = time.perf_counter() - began
        return [
            self._recorded(part, outcome, seconds=seconds, together=len(group))
            for part, outcome in zip(group, outcomes, strict=True)
        ]

    def _recorded(self, part: Part, outcome: Outcome, *, seconds: float, first: int = 0, together: int = 1) -> Ended:
        """The run, with its result.json written.

        Args:
          seconds: of all runs that were trained at once.
          first: the step that it went on from.
          together: how many were trained at once.
        """
        directory = run_directory(part.config)
        result = result_of(part.config, directory, outcome, self._data, seconds=seconds, together=together)
        result |= {
            "flops_per_step": self._operations_of(part.config),
            "resumed_from": first,
            "command": f"{self._asked.command} --only={part.number}",
        }
        write_object(directory / "result.json", result)
        label = "" if result["status"] == DIVERGED else "loss "
        whose = "" if together == 1 else f"{part.config.run.name}: "
        say(f"{whose}{label}{outcome_text(result)} in {duration(result['seconds'])}")
        return self._paired(part.config, result)

    def _paired(self, config: RunConfig, result: dict[str, Any]) -> Ended:
        """The run, compared with the first one of its seed that recorded what it began with."""
        if read_record(run_directory(config)) is not None:
            pair = self._first_of_seed.setdefault(config.train.seed, config), config
            check_paired(
                [run_directory(each) for each in pair],
                precision=max(float(jnp.finfo(each.model.param_dtype).eps) for each in pair),
            )
        return Ended(config, result)

    def _operations_of(self, config: RunConfig) -> int | None:
        """Operations of a step, counted once for each structure; None where they cannot be counted."""
        key = repr(compiled_values(config))
        if key not in self._operations:
            try:
                self._operations[key] = step_operations(config)
            except UserError:  # a kernel in it, such as that of experts; the report then shows no costs
                self._operations[key] = None
        return self._operations[key]


def step_operations(config: RunConfig) -> int:
    """Arithmetic operations of one training step over all devices, as training/arithmetic.py counts.

    Attention is counted as `xla` computes it, whatever computes it: all scores of a sequence, also those that are
    masked.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla", remat="none"))
    return operations(Program(plain).trace_train_step().jaxpr.jaxpr)


def _is_new(config: RunConfig) -> bool:
    """Whether a run has neither a result nor a checkpoint."""
    directory = run_directory(config)
    if (directory / "result.json").exists():
        return False
    saved = saved_run(directory)
    return saved is None or saved.step is None


def _found_text(found: Swept) -> str:
    if found.best is None:
        return "no run of the sweep finished, so no seed is trained"
    text = f"of the learning rates {', '.join(f'{rate:g}' for rate in found.tried)} the best is {found.best:g}"
    return text if found.edge is None else f"{text}, the {found.edge} that was tried"
