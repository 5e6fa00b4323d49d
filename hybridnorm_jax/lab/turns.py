"""Times several functions in turns, so that what disturbs the machine disturbs all of them alike."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

# A turn is as many calls as take this many seconds, but no more calls than this.
TURN, MOST_CALLS = 0.02, 20


class Quartiles(NamedTuple):
    """The quartiles of a number of measurements."""

    lower: float
    median: float
    upper: float


def quartiles(values: Float[np.ndarray, "rounds"]) -> Quartiles:
    """The quartiles, by linear interpolation."""
    lower, median, upper = np.percentile(values, [25, 50, 75]).tolist()
    return Quartiles(lower=lower, median=median, upper=upper)


def measure(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Float[np.ndarray, "rounds"]]:
    """Seconds per call of each step in each round.

    A turn is one call, or several where a call is short, and is waited for at its end. Two calls and a turn of each
    step come before what is timed.

    Args:
      steps: name -> a function that starts work on the device and returns its result.

    Raises:
      RuntimeError: a result is not finite.
    """
    for name, step in steps.items():  # compiles, and is the first half of the warm-up
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step())):
            raise RuntimeError(f"{name}: its result is not finite")
    shortest = min(_seconds_per_call(step, calls=1) for step in steps.values())
    calls = min(MOST_CALLS, max(1, math.ceil(TURN / shortest)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for order in turn_orders(list(steps), rounds):
        for name in order:
            times[name].append(_seconds_per_call(steps[name], calls=calls))
    return {name: np.array(values) for name, values in times.items()}


def _seconds_per_call(step: Callable[[], Any], *, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        result = step()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def turn_orders(names: Sequence[str], rounds: int) -> list[list[str]]:
    """An order of the names for each round.

    For an even number of names, each name follows each other name once in that many rounds: the first order takes the
    names at 0, 1, -1, 2, -2, ..., and every further order is the one before, shifted by one (a Williams square).
    """
    count = len(names)
    first_order = [_zigzag(number) for number in range(count)]
    return [[names[(place + shift) % count] for place in first_order] for shift in range(rounds)]


def _zigzag(number: int) -> int:
    """0, 1, -1, 2, -2, ..."""
    distance = (number + 1) // 2
    return distance if number % 2 else -distance
