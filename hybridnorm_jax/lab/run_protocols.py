"""By which protocol a run was made: its budget and the choice of its rate. Runs of different protocols do not compare.

A budget of operations (flops=N) makes the runs of costlier schemes shorter, so their train.steps differ on purpose.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.compare_options import CompareOptions

SWEEP = "sweep"
# Keys of `hybridnorm lab compare` that decide how long a run is and how its rate was chosen.
KEYS = ("tokens", "flops", SWEEP, "sweep_seeds")
# Only looked at where there is a sweep: without one it changes nothing.
OF_A_SWEEP = "sweep_seeds"


def protocol_of(command: str) -> dict[str, tuple[float, ...]]:
    """The numbers that a command gives to each of KEYS, in rising order: the order of a grid changes nothing.

    None where it does not name the key or sets it to null, but a sweep has seeds in any case.
    """
    found: dict[str, tuple[float, ...]] = dict.fromkeys(KEYS, ())
    for argument in _words(command):
        key, equals, text = argument.partition("=")
        if equals and key in found:
            found[key] = _numbers(text)
    if not found[SWEEP]:
        found[OF_A_SWEEP] = ()
    elif not found[OF_A_SWEEP]:
        found[OF_A_SWEEP] = tuple(map(float, CompareOptions().sweep_seeds))
    return found


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # quotes that do not end: it was edited
        return command.split()


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list, or of one value; what is no number is left out."""
    numbers = []
    for part in text.strip("[]() ").split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            continue
    return tuple(sorted(numbers))


def other_protocol(command: str, other: str) -> str | None:
    """In which key two runs' protocols differ, such as "flops (1e+12 and none)"; None where they are the same.

    Args:
      command, other: what made each run. Nothing is said of one that is empty.
    """
    if not command or not other:
        return None
    ours, theirs = protocol_of(command), protocol_of(other)
    for key in KEYS:
        # A sweep may go on with a wider grid: each label's best rate is sought until it lies within its own.
        if bool(ours[key]) != bool(theirs[key]) or (key != SWEEP and ours[key] != theirs[key]):
            return f"{key} ({_text(ours[key])} and {_text(theirs[key])})"
    return None


def _text(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "none"


def operations(steps: int, result: Mapping[str, Any]) -> float | None:
    """How many arithmetic operations so many steps take; None where the result does not say what one takes.

    Args:
      result: the content of result.json.
    """
    each = result.get("flops_per_step")
    return None if each is None else float(each) * steps


def check_budget(where: str, steps: int, result: Mapping[str, Any], flops: float) -> None:
    """Refuse a run that did not spend the budget of operations of its comparison, to within one step.

    Args:
      where: the run, as the message names it.
      steps: of the whole run.
      result: the content of its result.json, or {}: of a run without one nothing is known.

    Raises:
      UserError: names the run and both numbers.
    """
    spent = operations(steps, result)
    if spent is not None and abs(spent - flops) > spent / steps:
        right = f"the budget of comparison.json is flops={flops:g}: such runs cannot be compared"
        raise UserError(f"{where}: its {steps:,} steps are {spent:.4g} operations, but {right}")
