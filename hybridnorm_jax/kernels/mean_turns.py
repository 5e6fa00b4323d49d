"""How often a loop turns that turns as often as the data ask for: a name in the compiled program, for who counts it."""

import contextlib
import re

import jax

_NAME = "mean_turns_"
_LOOP = re.compile(rf"{_NAME}(\d+)/while$")


def mean_turns(count: int) -> contextlib.AbstractContextManager:
    """Says of the loop inside that it turns this often when the load is balanced."""
    return jax.named_scope(f"{_NAME}{count}")


def turns_of(op_name: str) -> int | None:
    """What mean_turns said of the loop with this path of named scopes; None where it said nothing."""
    found = _LOOP.search(op_name)
    return int(found[1]) if found else None
