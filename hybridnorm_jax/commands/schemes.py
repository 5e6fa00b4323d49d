"""`hybridnorm schemes`: print norm placements as tables."""

from collections.abc import Sequence

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.model.schemes import SCHEMES

DEPTH = 4
USAGE = f"""usage: hybridnorm schemes [SCHEME ...] [DEPTH]

Prints where each scheme normalizes, as one table a scheme for a model of DEPTH blocks (default {DEPTH}); all of the
schemes where none is named."""


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm schemes [SCHEME ...] [DEPTH]`."""
    if wants_help(arguments):
        print(USAGE)
        return
    names, depth = list(arguments), DEPTH
    if names and names[-1].isdecimal():
        depth = int(names.pop())
    for name in names:
        if name not in SCHEMES:
            raise UserError(f"{name}: no such scheme{did_you_mean(name, SCHEMES)}")
    if depth < 1:
        raise UserError(f"{depth}: a model has at least one block")
    print("\n\n".join(SCHEMES[name].table(depth) for name in names or SCHEMES))
