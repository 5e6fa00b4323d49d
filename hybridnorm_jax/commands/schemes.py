"""`hybridnorm schemes`: print norm placements as tables."""

import textwrap
from collections.abc import Sequence

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.model.config_sizes import MOST_LAYERS
from hybridnorm_jax.model.schemes import SCHEMES

DEPTH = 4
USAGE = """usage: hybridnorm schemes [SCHEME ...] [DEPTH]

Prints where each scheme normalizes: one table for each, of a model of {depth} blocks
or of DEPTH blocks. Without SCHEME it prints all of them:
{names}"""


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm schemes [SCHEME ...] [DEPTH]`."""
    check_syntax("schemes", arguments)
    if wants_help(arguments):
        names = textwrap.fill(", ".join(SCHEMES), 80, initial_indent="  ", subsequent_indent="  ")
        print(USAGE.format(depth=DEPTH, names=names))
        return
    names, depth = list(arguments), DEPTH
    if names and names[-1].isascii() and names[-1].isdecimal():
        depth = _depth(names.pop())
    for name in names:
        if name not in SCHEMES:
            raise UserError(f"{name}: no such scheme{did_you_mean(name, SCHEMES)}")
    print("\n\n".join(SCHEMES[name].table(depth) for name in names or SCHEMES))


def _depth(text: str) -> int:
    # Python reads no number of more than 4,300 digits.
    depth = int(text[:10])
    if not 1 <= depth <= MOST_LAYERS:
        raise UserError(f"{text}: a model has 1 to {MOST_LAYERS:,} blocks")
    return depth
