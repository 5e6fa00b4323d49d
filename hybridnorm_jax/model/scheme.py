"""What an entry of SCHEMES is, how one is entered, and the table as text.

Importing this module fills no table: schemes.py does.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, Literal

from hybridnorm_jax.errors import ConfigError, UserError, did_you_mean
from hybridnorm_jax.model.placement import (
    HEAD_NORMS,
    HIDDEN_NORMS,
    BlockPlacement,
    SideStream,
    SublayerPlacement,
)
from hybridnorm_jax.model.ramps import DEFAULT_RAMP_STEPS, grown

# It becomes part of the name of a run.
LONGEST_NAME = 60
WIDTH = 120
BlockRule = Callable[[int, int], BlockPlacement]
Checked = Literal["authors' code", "third party", "equation only"]
CHECKED_BY: dict[Checked, str] = {
    "authors' code": "the tests reproduce numbers of the authors' code",
    "third party": "the tests reproduce numbers of somebody else's code",
    "equation only": "the tests compare with the equation alone, and with no other code",
}
# What stands in the equations where something else than a sum joins residual and branch.
JOININGS = {
    "chord": "u(v) = v / |v|; of g counts the size",
    "geodesic": "exp_x(v): x cos a + |x| v/|v| sin a, a = |v|/|x|, of v the part that is orthogonal to x",
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A rule for all layers, and what the whole model needs with it.

    Attributes:
      name: the key in SCHEMES.
      block: (layer, num_layers) -> BlockPlacement; layers count from 0.
      final_norm: whether a norm stands before the head.
      side_stream: how the second stream of its placements begins and ends, where they have one.
      embedding_norm: whether a norm stands after the embedding (`model.embedding_norm=auto` follows it).
      initializer: the initializer its authors recommend (`model.initializer=auto` follows it).
      sphere: whether the model is that of nGPT (2410.01131) outside its blocks, too: every logit is times a learned
        number, and training keeps the vectors of every matrix along embed at length 1.
      source: where the equations stand: the paper, its arXiv number, and the equation or section.
      checked: whose numbers the tests compare these placements with: those of the "authors' code", meaning the code
        that source names or the paper's; those of a "third party"; or of nobody's code, "equation only". None: a
        scheme of a file of yours that does not say.
    """

    name: str
    block: BlockRule
    final_norm: bool = True
    side_stream: SideStream | None = None
    embedding_norm: bool = False
    initializer: str = "normal"
    sphere: bool = False
    source: str = ""
    checked: Checked | None = None

    def __post_init__(self) -> None:
        for name in ("final_norm", "embedding_norm", "sphere"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: must be True or False")
        if not (isinstance(self.source, str) and self.source.isprintable()):
            raise ValueError(f"source={self.source!r:.80}: must be a text of one line")
        if self.checked not in (None, *CHECKED_BY):
            raise ValueError(f"checked={self.checked!r:.80} must be one of {', '.join(map(repr, CHECKED_BY))}, or None")

    def placements(
        self,
        num_layers: int,
        *,
        branch_multiplier: float = 1.0,
        ramp_steps: int | None = None,
        ramp_at: int | None = None,
    ) -> tuple[BlockPlacement, ...]:
        """The placement of every layer, first to last.

        Args:
          num_layers: of the model.
          branch_multiplier: a factor of every branch_scale.
          ramp_steps, ramp_at: where branches grow with the training step, they have the size that they have after
            ramp_at updates, of ramp_steps until they are whole; see ramps.py. ramp_at=None: they grow.

        Raises:
          ConfigError: the rule, which may be a plugin's, fails for a layer or returns another thing than a placement.
        """
        placements = list(self._of_layers(num_layers))
        if ramp_at is not None:
            placements = [
                grown(each, layer, num_layers, ramp_steps=ramp_steps or DEFAULT_RAMP_STEPS, step=ramp_at)
                for layer, each in enumerate(placements)
            ]
        if branch_multiplier != 1:
            placements = [each.with_branches_times(branch_multiplier) for each in placements]
        return tuple(placements)

    # A configuration asks for them dozens of times, and what a rule gives depends on its arguments alone.
    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a scheme lives as long as the program
    def _of_layers(self, num_layers: int) -> tuple[BlockPlacement, ...]:
        return tuple(self._placement(layer, num_layers) for layer in range(num_layers))

    def _placement(self, layer: int, num_layers: int) -> BlockPlacement:
        where = f"model.scheme={self.name}: its function, called for layer {layer} of {num_layers},"
        try:
            placement = self.block(layer, num_layers)
        except Exception as error:
            raise ConfigError(f"{where} raises {type(error).__name__}: {error}") from error
        if not isinstance(placement, BlockPlacement):
            raise ConfigError(f"{where} must return a BlockPlacement, not {type(placement).__name__}")
        if placement.has_side_stream != (self.side_stream is not None):
            stated = "has a" if placement.has_side_stream else "has no"
            right = "side_stream of the scheme says how it begins and ends, and all of its placements have it"
            raise ConfigError(f"{where} returns a placement that {stated} side stream; {right}")
        return placement

    def table(self, num_layers: int) -> str:
        """The scheme at this depth as text: one line per stretch of layers with equal placement."""
        placements = self.placements(num_layers)
        lines = [f"{self.name}, {num_layers} layers   (x: the sublayer's input, X: the block's input, N: a norm)"]
        if any(placement.has_learned_scales for placement in placements):
            lines.append("  learned: a, one number; g and w, a number for each channel")
        if any(placement.grows for placement in placements):
            lines.append("  t: a share that grows from 0 to 1 with the training step, see model.ramp_steps")
        joins = {sublayer.joins for each in placements for sublayer in (each.attention, each.feed_forward)}
        lines += [f"  {JOININGS[name]}" for name in JOININGS if name in joins]
        if self.side_stream is not None:
            lines.append("  s: the side stream, z: what the sublayer adds")
        layers = enumerate(placements)
        for placement, equal in groupby(layers, key=lambda layer: layer[1]):
            lines += _stretch_lines(placement, [number for number, _ in equal])
        lines.append(f"  model: {self._outside_the_blocks()}; initializer {self.initializer}")
        if self.source:
            lines.append(f"  source: {self.source}")
        if self.checked is not None:
            lines.append(f"  checked: {self.checked}; {CHECKED_BY[self.checked]}")
        return "\n".join(lines)

    def summary(self, num_layers: int) -> str:
        """Two lines or three: name, who checked it and source; then the equations of the middle layer at this depth."""
        placements = self.placements(num_layers)
        middle = placements[num_layers // 2]
        first = f"{self.name:<26}{self.checked or '':<15}{self.source}".rstrip()
        formulas = f"{middle.attention.formula('Attn')};  {middle.feed_forward.formula('FFN')}"
        notes = [*_norms_inside(middle), *self._unusual_outside()]
        others = [number for number, placement in enumerate(placements) if placement.structure != middle.structure]
        if others:
            notes.append(f"layer {others[0]} differs" if len(others) == 1 else f"layers {_numbers(others)} differ")
        second = f"{formulas}   [{', '.join(notes)}]" if notes else formulas
        return f"{_wrapped(first, further=41)}\n{_wrapped(f'    {second}', further=8)}"

    def _unusual_outside(self) -> Iterator[str]:
        if self.side_stream is not None:
            yield self.side_stream.formula
        if self.embedding_norm:
            yield "embedding norm"
        if not self.final_norm:
            yield "no final norm"
        if self.sphere:
            yield "logits times learned numbers"
            yield "matrices of length 1 along the embedding"

    def _outside_the_blocks(self) -> str:
        norms = []
        if self.embedding_norm:
            norms.append("embedding norm")
        if self.side_stream is not None:
            norms.append(self.side_stream.formula)
        if self.final_norm:
            norms.append("final norm")
        if self.sphere:
            norms.append("a learned number for each logit, matrices of length 1 along the embedding")
        return ", ".join(norms) or "no norm outside the blocks"


def _stretch_lines(placement: BlockPlacement, layers: list[int]) -> Iterator[str]:
    """The lines of `Scheme.table` for consecutive layers of one placement."""
    stretch = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    extents = {name.removesuffix("_norm"): getattr(placement, name) for name in HEAD_NORMS}
    norms = [f"{name} per {extent}" for name, extent in extents.items() if extent is not None]
    norms += [f"FFN's {name.removesuffix('_norm')}" for name in HIDDEN_NORMS if getattr(placement, name)]
    shared = "   one pre norm for both branches" if placement.shared_pre_norm else ""
    shared += "   one learned scale for both branches" if placement.shared_layer_scale else ""
    yield (f"  {stretch}   normalized: {', '.join(norms)}" if norms else f"  {stretch}") + shared
    yield f"    attention     {placement.attention.formula('Attn')}{_starts(placement.attention)}"
    yield f"    feed-forward  {placement.feed_forward.formula('FFN')}{_starts(placement.feed_forward)}"
    if placement.head_scales is not None:
        yield f"    heads         times a learned number each, {placement.head_scales} the output projection"
    if placement.sphere:
        yield "    inside        q and k of length 1 behind the rotation; these, gate and up times learned numbers"


def _norms_inside(placement: BlockPlacement) -> Iterator[str]:
    """What the equations of a block's sublayers do not show, in a few words each."""
    for extent, words in (("head", "per head"), ("projection", "over the projection")):
        names = [name.removesuffix("_norm") for name in HEAD_NORMS if getattr(placement, name) == extent]
        if names:
            yield f"N of {' '.join(names)} {words}"
    names = [name.removesuffix("_norm") for name in HIDDEN_NORMS if getattr(placement, name)]
    if names:
        yield f"N of FFN's {' '.join(names)}"
    if placement.head_scales is not None:
        yield f"heads times a learned number {placement.head_scales} the output projection"
    if placement.sphere:
        yield "q, k of length 1; q, k, gate, up times learned numbers"
    if placement.shared_pre_norm:
        yield "one N(X) for both"
    if placement.shared_layer_scale:
        yield "one a for both"


def _numbers(numbers: list[int]) -> str:
    """Numbers in rising order as text, such as "0-3" or "0, 2"."""
    is_range = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if is_range else ", ".join(map(str, numbers))


def _wrapped(line: str, *, further: int) -> str:
    """The line in lines of at most WIDTH columns, the further ones with so many spaces in front."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * further, break_on_hyphens=False))


def _starts(sublayer: SublayerPlacement) -> str:
    """Which learned scales of a sublayer start at another number than 1, in words."""
    found = {name: start for name, start in sublayer.starts._asdict().items() if start != 1.0}
    words = [
        f"{name.replace('_', ' ')} {'' if name == 'layer_scale' else 'norm '}at {start:.4g}"
        for name, start in found.items()
    ]
    return f"   starts: {', '.join(words)}" if words else ""


SCHEMES: dict[str, Scheme] = {}


def scheme(name: str, **model: Any) -> Callable[[BlockRule], BlockRule]:
    """Decorator: enter `(layer, num_layers) -> BlockPlacement` into SCHEMES. `model` are Scheme's other fields.

    Raises:
      ValueError: the name is taken or is none, or a field has a value that it cannot have.
    """

    def enter(block: BlockRule) -> BlockRule:
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            raise ValueError(f"a scheme's name must be a text of 1 to {LONGEST_NAME} characters, not {name!r}")
        if name in SCHEMES:
            raise ValueError(f"a scheme named {name!r} already exists")
        SCHEMES[name] = Scheme(name=name, block=block, **model)
        return block

    return enter


def schemes() -> tuple[str, ...]:
    """The names of all schemes, in the order of the table."""
    return tuple(SCHEMES)


def describe(scheme: str, depth: int) -> str:
    """Where a scheme normalizes in a model of `depth` blocks, as text; what `hybridnorm schemes` prints.

    Raises:
      UserError: no scheme of this name, or no block.
    """
    if scheme not in SCHEMES:
        raise UserError(f"{scheme}: no such scheme{did_you_mean(scheme, SCHEMES)}")
    if type(depth) is not int:
        raise UserError(f"depth={depth!r}: must be an integer")
    if depth < 1:
        raise UserError(f"{depth}: a model has at least one block")
    return SCHEMES[scheme].table(depth)
