"""Draws a block of every scheme, docs/pictures/schemes/NAME.svg: python docs/pictures/blocks.py.

The pictures are made from the placements, so that a scheme has its picture by being in the table. The residual stream
runs from left to right, the branches above it, and a side stream above these. One file serves light and dark pages: it
asks the reader's system which of them is wanted.
"""

import dataclasses
from html import escape
from itertools import groupby
from pathlib import Path

import hybridnorm_jax as hn
from hybridnorm_jax.model.placement import HEAD_NORMS, HIDDEN_NORMS, BlockPlacement, SublayerPlacement

FOLDER = Path(__file__).resolve().parent / "schemes"
# Numbers that follow from the layer or from the depth are shown for the middle one of so many layers.
DEPTH = 8
STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1f2328; }
  .small { font-size: 10.5px; fill: #57606a; }
  .scale { font-size: 11.5px; fill: #9a4a00; }
  path { stroke: #57606a; stroke-width: 1.4; fill: none; }
  .side { stroke: #1a7f37; }
  .dot, .head { fill: #57606a; stroke: none; }
  .side-head { fill: #1a7f37; stroke: none; }
  .branch { fill: #f6f8fa; stroke: #8c959f; }
  .norm { fill: #ddeeff; stroke: #2f6fbf; }
  .plus { fill: #ffffff; stroke: #57606a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #a3adb8; } .scale { fill: #ffb77c; }
    path { stroke: #9aa4af; } .side { stroke: #57c26d; }
    .dot, .head { fill: #9aa4af; } .side-head { fill: #57c26d; }
    .branch { fill: #21262d; stroke: #6e7681; } .norm { fill: #14304f; stroke: #5aa0f2; }
    .plus { fill: #161b22; stroke: #9aa4af; }
  }
"""
TIMES = "\N{MULTIPLICATION SIGN}"
GAP = 12
NORM_WIDTH, NORM_HEIGHT = 24, 20
JOINT_WIDTH = 50
# What the picture shows of each field of a placement; a field that is not here has no picture yet, and a test says so.
SHOWN = {
    SublayerPlacement: (
        *("pre", "branch", "post", "entry", "residual", "reads", "side", "side_own"),
        *("residual_scale", "branch_scale", "input_scale", "side_scale", "residual_vector", "layer_scale"),
        *("pre_norm_init", "branch_norm_init", "layer_scale_init", "branch_ramp", "joins"),
    ),
    BlockPlacement: (
        *("attention", "feed_forward", *HEAD_NORMS, *HIDDEN_NORMS, "head_scales"),
        *("shared_pre_norm", "shared_layer_scale", "sphere"),
    ),
}


@dataclasses.dataclass
class Rows:
    """The heights at which things are drawn: of the side stream, of the branches, of the residual stream, of X."""

    side: float
    branch: float
    main: float
    block: float


class Picture:
    """SVG in the making: shapes over lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shapes: list[str] = []
        self.right = 0.0

    def line(self, path: str, style: str = "") -> None:
        """A line, given as an SVG path."""
        self.lines.append(f'<path{f" class={style!r}" if style else ""} d="{path}"/>'.replace("'", '"'))

    def arrow(self, path: str, x: float, y: float, turn: int = 0, style: str = "") -> None:
        """A line whose head points to (x, y): to the right, or turned by so many degrees."""
        self.line(path, style)
        head = f"{style}-head" if style else "head"
        place = f"translate({x:g} {y:g})" + (f" rotate({turn})" if turn else "")
        self.shapes.append(f'<path class="{head}" transform="{place}" d="M0 0 l-7 -3.5 v7 z"/>')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> None:
        """Words whose middle, start or end is at x."""
        self.right = max(self.right, x + wide(words, 6.6) * {"start": 1, "middle": 0.5, "end": 0}[anchor])
        style = f' class="{style}"' if style else ""
        side = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.shapes.append(f'<text{style} x="{x:g}" y="{y:g}"{side}>{escape(words)}</text>')

    def dot(self, x: float, y: float, style: str = "dot") -> None:
        """Where a line divides."""
        self.shapes.append(f'<circle class="{style}" cx="{x:g}" cy="{y:g}" r="2.6"/>')

    def plus(self, x: float, y: float) -> None:
        """A sum."""
        self.shapes.append(f'<circle class="plus" cx="{x:g}" cy="{y:g}" r="8"/>')
        self.lines_over(f"M{x - 4:g} {y:g} h8 M{x:g} {y - 4:g} v8")

    def joint(self, x: float, y: float, words: str) -> None:
        """What stands in the place of a sum."""
        self.box(x - JOINT_WIDTH / 2, y, JOINT_WIDTH, 18, "plus")
        self.text(x, y + 4, words, "small")

    def lines_over(self, path: str) -> None:
        """A line over shapes."""
        self.shapes.append(f'<path d="{path}"/>')

    def box(self, x: float, y: float, width: float, height: float, style: str, *, dashed: bool = False) -> None:
        """A box, its left side at x, its middle at y."""
        dashes = ' stroke-dasharray="3 2"' if dashed else ""
        place = f'x="{x:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        self.shapes.append(f'<rect class="{style}" {place} rx="4"{dashes}/>')

    def norm(self, x: float, y: float, note: str = "", *, dashed: bool = False) -> float:
        """A norm; returns where it ends. The note stands above it, and may need more room than the norm."""
        room = max(NORM_WIDTH, wide(note, 5.4))
        middle = x + room / 2
        if room > NORM_WIDTH:
            self.line(f"M{x:g} {y:g} h{room:g}")
        self.box(middle - NORM_WIDTH / 2, y, NORM_WIDTH, NORM_HEIGHT, "norm", dashed=dashed)
        self.text(middle, y + 4, "N")
        if note:
            self.text(middle, y - 14, note, "small")
        return x + room


def number(value: float) -> str:
    """A scale as text."""
    return f"{TIMES}{value:.3g}"


def wide(words: str, size: float = 6.2) -> float:
    """About how wide words of this size of letters are."""
    return size * len(words)


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """What one sublayer's picture needs: its placement, what its branch is called, and what the block says of it."""

    placement: SublayerPlacement
    title: str
    notes: list[str]
    same_norm: bool = False
    same_scale: bool = False

    def draw(self, picture: Picture, x: float, rows: Rows) -> float:
        """The sublayer from x on; returns where the residual stream leaves it."""
        own = self.placement
        if own.entry:
            picture.line(f"M{x:g} {rows.main:g} h{GAP}")
            x = picture.norm(x + GAP, rows.main)
        split = x + GAP
        picture.line(f"M{x:g} {rows.main:g} H{split:g}")
        start = split
        self._lead_up(picture, split, rows)
        end = self._branch(picture, start, rows)
        half = 8 if own.joins == "sum" else JOINT_WIDTH / 2
        total = end + GAP + half - 8
        self._add(picture, split, end, total, rows)
        if own.joins == "sum":
            picture.plus(total, rows.main)
        else:
            picture.joint(total, rows.main, {"chord": "chord", "geodesic": "sphere"}[own.joins])
        x = total + half
        if own.post:
            picture.line(f"M{x:g} {rows.main:g} h{GAP}")
            x = picture.norm(x + GAP, rows.main)
        return x

    def _lead_up(self, picture: Picture, split: float, rows: Rows) -> None:
        """The line from what the branch reads up to the branch."""
        if self.placement.reads == "block" and self.title == "FFN":
            hop = f"V{rows.main + 5:g} a5 5 0 0 1 0 -10 V{rows.branch:g}"
            picture.line(f"M{split:g} {rows.block:g} {hop} h{GAP}")
            return
        picture.line(f"M{split:g} {rows.main:g} V{rows.branch:g} h{GAP}")
        picture.dot(split, rows.main)

    def _branch(self, picture: Picture, x: float, rows: Rows) -> float:
        """The parts of the branch from left to right; returns where it ends."""
        own, y = self.placement, rows.branch
        x += GAP
        if own.side == "read":
            x = self._read_side(picture, x, rows)
        if own.pre:
            note = "the same" if self.same_norm else _start(own.pre_norm_init)
            x = self._advance(picture, picture.norm(x, y, note, dashed=self.same_norm), y)
        if own.input_scale != 1:
            x = self._scale(picture, x, y, number(own.input_scale))
        x = self._function(picture, x, y)
        if own.branch:
            x = self._advance(picture, x, y)
            x = picture.norm(x, y, _start(own.branch_norm_init))
        if own.layer_scale is not None and own.joins != "chord":
            x = self._advance(picture, x, y)
            note = "the same" if self.same_scale else _start(own.layer_scale_init)
            x = self._scale(picture, x, y, f"{TIMES}a" if own.layer_scale == "scalar" else f"{TIMES}g", note) - GAP
        return x

    def _read_side(self, picture: Picture, x: float, rows: Rows) -> float:
        """own(x) + N(s), from x on."""
        own, y = self.placement, rows.branch
        if own.side_own == "vector":
            x = self._scale(picture, x, y, f"{TIMES}w")
        if own.side_own == "norm":
            x = self._advance(picture, picture.norm(x, y), y)
        total = x + 8
        middle = (rows.side + y) / 2
        picture.line(f"M{total:g} {rows.side:g} V{y:g}", "side")
        picture.dot(total, rows.side, "side-head")
        picture.norm(total - NORM_WIDTH / 2, middle - 2)
        picture.plus(total, y)
        return self._advance(picture, total + 8, y)

    def _advance(self, picture: Picture, x: float, y: float) -> float:
        picture.line(f"M{x:g} {y:g} h{GAP}")
        return x + GAP

    def _scale(self, picture: Picture, x: float, y: float, words: str, note: str = "") -> float:
        """A factor on the line; returns where the next part begins."""
        width = max(wide(words), wide(note, 5.4)) + 4
        picture.line(f"M{x:g} {y:g} h{width + GAP:g}")
        picture.text(x + width / 2, y - 5, words, "scale")
        if note:
            picture.text(x + width / 2, y + 13, note, "small")
        return x + width + GAP

    def _function(self, picture: Picture, x: float, y: float) -> float:
        """The box of attention or of the feed-forward layer, with what stands inside."""
        width = max([46, *(wide(note, 5.4) + 14 for note in self.notes)])
        height = 24 + 13 * len(self.notes)
        picture.box(x, y, width, height, "branch")
        top = y - height / 2
        picture.text(x + width / 2, top + 16, self.title)
        for place, note in enumerate(self.notes):
            picture.text(x + width / 2, top + 30 + 13 * place, note, "small")
        return x + width

    def _add(self, picture: Picture, split: float, end: float, total: float, rows: Rows) -> None:
        """The lines into the sum: the branch from above, the residual from the left or from below."""
        own, left = self.placement, total - (8 if self.placement.joins == "sum" else JOINT_WIDTH / 2)
        picture.arrow(f"M{end:g} {rows.branch:g} H{total:g} V{rows.main - 8:g}", total, rows.main - 8, 90)
        added = [number(own.branch_scale)] if own.branch_scale != 1 else []
        added += [f"{TIMES}g"] if own.joins == "chord" else []
        added += {None: [], "by_depth": [f"{TIMES}t(l)"], "together": [f"{TIMES}t"]}[own.branch_ramp]
        if added:
            picture.text(total + 4, (rows.branch + rows.main) / 2 + 4, " ".join(added), "scale", "start")
        if own.side is not None:
            picture.arrow(f"M{total:g} {rows.branch:g} V{rows.side + 8:g}", total, rows.side + 8, -90)
            picture.plus(total, rows.side)
            if own.side_scale != 1:
                words = number(own.side_scale)
                picture.text(total + 4, (rows.branch + rows.side) / 2 + 4, words, "scale", "start")
        if own.residual != "block":
            picture.arrow(f"M{split:g} {rows.main:g} H{left:g}", left, rows.main)
        if own.residual != "input":
            picture.arrow(f"M{total:g} {rows.block:g} V{rows.main + 8:g}", total, rows.main + 8, -90)
        factors = f"{TIMES}w " * own.residual_vector + (number(own.residual_scale) if own.residual_scale != 1 else "")
        if factors:
            picture.text((split + total) / 2, rows.main + 14, factors.strip(), "scale")


def _start(value: float) -> str:
    return "" if value == 1 else f"from {value:.3g}"


def sublayers(placement: BlockPlacement) -> tuple[Sublayer, Sublayer]:
    """The two sublayers of a block, with what stands inside their branches in words."""
    notes = []
    for extent, words in (("head", "per head"), ("projection", "over all heads")):
        names = [name.removesuffix("_norm") for name in HEAD_NORMS if getattr(placement, name) == extent]
        names = ["context" if name == "context" else name for name in names]
        if names:
            notes.append(f"N of {', '.join(names)} {words}")
    if placement.head_scales is not None:
        notes.append(f"{TIMES}c per head {placement.head_scales} W")
    if placement.sphere:
        notes.append(f"q, k of length 1, {TIMES}c")
    hidden = [name.removesuffix("_norm") for name in HIDDEN_NORMS if getattr(placement, name)]
    inside = [f"N of {', '.join(hidden)}"] if hidden else []
    if placement.sphere:
        inside.append(f"gate, up {TIMES}c")
    return (
        Sublayer(placement.attention, "Attn", notes),
        Sublayer(
            placement.feed_forward,
            "FFN",
            inside,
            same_norm=placement.shared_pre_norm,
            same_scale=placement.shared_layer_scale,
        ),
    )


def draw_block(picture: Picture, placement: BlockPlacement, top: float) -> tuple[float, float]:
    """One block below `top`; returns its width and where it ends below."""
    attention, feed_forward = sublayers(placement)
    highest = max(len(attention.notes), len(feed_forward.notes))
    has_side = placement.has_side_stream
    uses_block = placement.feed_forward.residual != "input" or placement.feed_forward.reads == "block"
    side = top + 14
    branch = (side + 58 if has_side else top + 26) + 6.5 * highest
    main = branch + 40 + 6.5 * highest
    rows = Rows(side=side, branch=branch, main=main, block=main + 26)
    start = 22.0
    picture.text(10, main + 4, "X")
    x = start
    if uses_block:
        picture.dot(x + GAP, main)
    end = attention.draw(picture, x, rows)
    ends = feed_forward.draw(picture, end, rows)
    if uses_block:
        fed = end + GAP if placement.feed_forward.reads == "block" else None
        last = ends - 8 - (GAP + NORM_WIDTH if placement.feed_forward.post else 0)
        to = last if placement.feed_forward.residual != "input" else fed
        picture.line(f"M{x + GAP:g} {main:g} V{rows.block:g} H{to:g}")
    picture.arrow(f"M{ends:g} {main:g} h18", ends + 18, main)
    if has_side:
        picture.text(10, side + 4, "s")
        picture.arrow(f"M{start:g} {side:g} H{ends + 18:g}", ends + 18, side, style="side")
    bottom = rows.block + 8 if uses_block else main + 20
    return ends + 26, bottom


def stretches(scheme: hn.Scheme) -> list[tuple[str, BlockPlacement]]:
    """The structures that layers have, in words which ones, each with the placement of its middle layer."""
    found = []
    layers = enumerate(scheme.placements(DEPTH))
    for _, equal in groupby(layers, key=lambda layer: layer[1].structure):
        members = list(equal)
        first, last = members[0][0], members[-1][0]
        words = f"layer {first}" if first == last else f"layers {first}-{last}"
        found.append((words, members[len(members) // 2][1]))
    return found


def drawing(name: str) -> str:
    """A scheme's picture as SVG."""
    scheme = hn.SCHEMES[name]
    picture, width, y = Picture(), 0.0, 4.0
    blocks = stretches(scheme)
    for words, placement in blocks:
        if len(blocks) > 1:
            picture.text(4, y + 12, words, "small", "start")
            y += 16
        block_width, y = draw_block(picture, placement, y)
        width = max(width, block_width, picture.right + 2)
    title = escape(f"A block of {name}: " + "; ".join(_equations(placement) for _, placement in blocks), quote=True)
    size = f'viewBox="0 0 {width:g} {y:g}" width="{width:g}" height="{y:g}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *picture.lines, *picture.shapes, "</svg>", ""])


def _equations(placement: BlockPlacement) -> str:
    return f"{placement.attention.formula('Attn')}, {placement.feed_forward.formula('FFN')}"


def write() -> None:
    """All pictures; those of schemes that are no longer in the table are deleted."""
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("*.svg"):
        if file.stem not in hn.SCHEMES:
            file.unlink()
    for name in hn.SCHEMES:
        (FOLDER / f"{name}.svg").write_text(drawing(name))


if __name__ == "__main__":
    write()
