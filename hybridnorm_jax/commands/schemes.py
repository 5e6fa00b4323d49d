"""`hybridnorm schemes`: list norm placements and kinds of norms, and print single placements as tables."""

import textwrap
from collections.abc import Sequence

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.model.config_sizes import MOST_LAYERS
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.scheme import CHECKED_BY, WIDTH
from hybridnorm_jax.model.schemes import SCHEMES

DEPTH = 4
USAGE = """usage: hybridnorm schemes [SCHEME ...] [DEPTH]

Without SCHEME it lists all schemes, each with its source, who checked it, and
its equations in the middle layer; and all kinds of norms. With SCHEME it prints
a table for each: where it normalizes, layer by layer. The model has {depth} blocks,
or DEPTH. The schemes are:
{names}"""
HEADING = """{count} schemes. Of each: its name, who checked it, its source; then the equations of attention and of the
feed-forward layer in layer {layer} of {depth}. x: the sublayer's input, X: the block's input, N: a norm. Learned are a,
one number, and g and w, a number for each channel. s: the side stream, z: what the sublayer adds."""
NORMS = "{count} kinds of norms (model.norm). Of each: its name, its source; then its formula, with scale w and bias b."


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
    print("\n\n".join(SCHEMES[name].table(depth) for name in names) if names else _everything(depth))


def _everything(depth: int) -> str:
    """All schemes in a few lines each, and all kinds of norms."""
    lines = [HEADING.format(count=len(SCHEMES), layer=depth // 2, depth=depth)]
    lines += [f"{name:>15}: {words}" for name, words in CHECKED_BY.items()]
    lines += ["", *(scheme.summary(depth) for scheme in SCHEMES.values())]
    lines += ["", NORMS.format(count=len(NORM_KINDS)), ""]
    for kind in NORM_KINDS.values():
        lines.append(textwrap.fill(f"{kind.name:<12}{kind.source}", WIDTH, subsequent_indent=" " * 12))
        lines.append(f"    {kind.formula or 'of a file of yours'}")
    return "\n".join(lines)


def _depth(text: str) -> int:
    # Python reads no number of more than 4,300 digits.
    depth = int(text[:10])
    if not 1 <= depth <= MOST_LAYERS:
        raise UserError(f"{text}: a model has 1 to {MOST_LAYERS:,} blocks")
    return depth
