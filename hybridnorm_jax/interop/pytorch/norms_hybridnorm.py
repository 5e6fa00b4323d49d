"""The norms of a HybridNorm model, the formula of its sublayers, and what multiplies the residual stream."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_hybridnorm import HEAD_NORMS, SIDE_STREAM, SUBLAYER, SWITCHES
from .sphere_hybridnorm import along_chord, along_sphere, wide

# The numbers that a kind of norm has besides weight and bias, and what they start at.
STARTS = {
    "dyt": {"alpha": 0.5},
    "derf": {"alpha": 0.5, "shift": 0.0},
    "bhyt": {"lam": 2.0},
}
GATE_RANK = 16


def placement_of(config, layer):
    """The placement of a layer, with every part that config.json leaves out: norms, "input", scales of 1."""
    stated = config.placements[layer]
    absent = {part: 1.0 if known is None else known[0] for part, known in SUBLAYER.items()}
    sublayers = {name: SimpleNamespace(**(absent | stated.get(name, {}))) for name in ("attention", "feed_forward")}
    inside = {name: stated.get(name) for name in (*HEAD_NORMS, "head_scales")}
    return SimpleNamespace(**sublayers, **inside, **{name: stated.get(name, False) for name in SWITCHES})


def apply_formula(f, sublayer_input, block_input, side, placement, norms):
    """y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))): every sublayer of every scheme.

    Where the placement has learned scales, r is w * r, and branch is g * branch. In the place of the sum stands what
    placement.joins says (sphere_hybridnorm.py). Where it has a side stream s, that
    becomes s + side_scale * branch(...), and where the branch reads it, x is own(x) + N(s).

    Returns:
      (y, the side stream or None).
    """
    entered = norms.entry(sublayer_input)
    x = block_input if placement.reads == "block" else entered
    if placement.side == "read":
        x = norms.own(x) + norms.side(side)
    r = {"input": entered, "block": block_input}.get(placement.residual)
    r = entered + block_input if placement.residual == "both" else r
    r, branch = norms.residual(r), norms.branch(f(times(placement.input_scale, norms.pre(x))))
    if placement.joins == "chord":
        y = along_chord(r, branch, lambda step: times(placement.branch_scale, norms.layer_scale(step)))
        return norms.post(y), None
    added = norms.layer_scale(branch)
    if placement.joins == "geodesic":
        return norms.post(along_sphere(r, times(placement.branch_scale, added))), None
    y = norms.post(times(placement.residual_scale, r) + times(placement.branch_scale, added))
    return y, None if side is None else side + times(placement.side_scale, added)


def times(scale, x):
    """scale * x, multiplied in float32 at least and rounded once; a scale of 1 or None changes nothing."""
    return x if scale is None or scale == 1 else (scale * wide(x)).to(x.dtype)


def capped(cap, x):
    """cap * tanh(x / cap); x where cap is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


class Norm(nn.Module):
    """A norm over the last axis, in float32 at least; eps stands inside the root.

    rmsnorm:   x / sqrt(mean(x^2) + eps)
    layernorm: (x - mean) / sqrt(variance + eps)
    crmsnorm:  x / sqrt((sum x^2 + (sum x)^2) / width + eps), for a zero-mean vector of length `width` whose last
               element is not stored
    dyt:       tanh(alpha x), alpha (1,)
    derf:      erf(alpha x + shift), alpha and shift (1,)
    bhyt:      tanh(0.1 lam x / sqrt(mean(x^2) + eps)), lam (1,)
    gated:     as rmsnorm

    times `weight`, or 1 + weight with plus_one, plus `bias`, where there are these. With `groups` both are (groups,
    size), a vector for each place of the last axis but one: norms of heads. The result y of "gated" is then times
    sigmoid(silu(y down) up), down (size, 16) and up (16, size).
    """

    def __init__(self, kind, size, *, eps, scale, bias, width=None, plus_one=False, initial_scale=1.0, groups=None):
        super().__init__()
        self.kind, self.size, self.eps, self.width = kind, size, eps, width or size + 1
        self.offset = 1.0 if plus_one else 0.0
        self.initial_scale, self.groups = initial_scale - self.offset, groups
        shape = (groups, size) if groups else (size,)
        self.weight = nn.Parameter(torch.full(shape, self.initial_scale)) if scale else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self.starts = STARTS.get(kind, {})
        for name, start in self.starts.items():
            setattr(self, name, nn.Parameter(torch.full((1,), start)))
        if kind == "gated":
            self.down = nn.Parameter(torch.zeros(size, GATE_RANK))
            self.up = nn.Parameter(torch.zeros(GATE_RANK, size))

    def forward(self, x):
        y = wide(x)
        weight = None if self.weight is None else self.weight.to(y.dtype)
        bias = None if self.bias is None else self.bias.to(y.dtype)
        if weight is not None and self.offset:
            weight = weight + self.offset
        if self.kind == "layernorm" and not self.groups:
            return F.layer_norm(y, (self.size,), weight, bias, self.eps).to(x.dtype)
        y = self.normalized(y)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        y = y * torch.sigmoid(self.gate(y)) if self.kind == "gated" else y
        return y.to(x.dtype)

    def gate(self, y):
        """silu(y down) up, also under autocast as wide as y."""
        with torch.autocast(y.device.type, enabled=False):
            return F.silu(y @ self.down.to(y.dtype)) @ self.up.to(y.dtype)

    def normalized(self, y):
        """y without weight and bias."""
        match self.kind:
            case "layernorm":
                return F.layer_norm(y, (self.size,), eps=self.eps)
            case "dyt":
                return torch.tanh(self.alpha.to(y.dtype) * y)
            case "derf":
                return torch.erf(self.alpha.to(y.dtype) * y + self.shift.to(y.dtype))
            case "bhyt":
                return torch.tanh(0.1 * self.lam.to(y.dtype) * self.over_root(y))
        return self.over_root(y)

    def over_root(self, y):
        """y over its root mean square, as the kind has that."""
        # The length of a vector in one pass over it, where the mean of its squares takes two.
        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square()
        if self.kind == "crmsnorm":
            square = (square + y.sum(-1, keepdim=True).square()) / self.width
        else:
            square = square / self.size
        return y * torch.rsqrt(square + self.eps)


def stream_norm(config, present=True, initial_scale=1.0):
    """A norm on the residual stream; the identity where it is not present."""
    if not present:
        return nn.Identity()
    affine = {"scale": config.norm_scale, "bias": config.norm_bias, "initial_scale": initial_scale}
    sizes = {"width": config.norm_width, "plus_one": config.norm_scale_plus_one}
    return Norm(config.norm, config.hidden_size, eps=config.norm_eps, **sizes, **affine)


def outer_norm(config, present=True, kind=None, eps=None):
    """A norm outside the blocks; the identity where it is not present. `eps` in the place of norm_eps."""
    if not present:
        return nn.Identity()
    affine = {"scale": config.has_outer_norm_scale, "bias": config.has_outer_norm_bias}
    sizes = {"width": config.norm_width, "plus_one": config.norm_scale_plus_one}
    return Norm(
        kind or config.outer_norm, config.whole_width, eps=config.norm_eps if eps is None else eps, **sizes, **affine
    )


def head_norm(config, extent, heads):
    """A norm on q, k, v or the context: over each "head", or over the whole "projection"."""
    whole = heads * config.head_dim
    per_head = extent == "head" and config.attention_norm_per_head
    return Norm(
        config.attention_norm,
        config.head_dim if extent == "head" else whole,
        eps=config.norm_eps,
        scale=config.attention_norm_scale,
        bias=config.attention_norm_bias,
        plus_one=config.norm_scale_plus_one,
        groups=heads if per_head else None,
    )


def hidden_norm(config, present, width):
    """A norm inside a feed-forward layer, over its hidden width; the identity where it is not present."""
    if not present:
        return nn.Identity()
    affine = {"scale": config.attention_norm_scale, "bias": config.attention_norm_bias}
    return Norm(config.attention_norm, width, eps=config.norm_eps, plus_one=config.norm_scale_plus_one, **affine)


class HeadScales(nn.Module):
    """Consecutive parts of the last axis, one for each head, times a learned weight each."""

    def __init__(self, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, x):
        parts = wide(x).unflatten(-1, (len(self.weight), -1))
        return (parts * wide(self.weight)[:, None]).flatten(-2).to(x.dtype)


# ---- The stream outside the blocks, which with whole_outside store it without its last element.


def into_blocks(config, x):
    """The embedding as the blocks have it: without its mean with embedding_centring, then stored with whole_outside."""
    x = centred(x) if config.embedding_centring else x
    return without_last(x, config.whole_width, config.hidden_size) if config.whole_outside else x


def out_of_blocks(config, x):
    """What the blocks give as the last norm reads it: whole with whole_outside."""
    return with_last(x, config.whole_width) if config.whole_outside else x


def without_last(x, width, stored):
    """The first width - 1 channels of whole vectors, filled up with zeros to `stored`."""
    return F.pad(x[..., : width - 1], (0, stored - (width - 1)))


def with_last(x, width):
    """Whole zero-mean vectors of `width` channels: the last one is minus the sum of the others."""
    kept = x[..., : width - 1]
    return torch.cat([kept, -wide(kept).sum(-1, keepdim=True).to(x.dtype)], dim=-1)


def centred(x):
    """x less its mean over the channels, in float32 at least."""
    return (wide(x) - wide(x).mean(-1, keepdim=True)).to(x.dtype)


class LayerScale(nn.Module):
    """What a branch adds, or a residual, times a learned weight per channel, or one weight where size is 1."""

    def __init__(self, size, start=1.0):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, x):
        return (wide(x) * wide(self.weight)).to(x.dtype)


class JoinedStreams(nn.Module):
    """main_scale * x + N(side), with main_norm main_scale * N(x) + N(side); x where there is no side stream."""

    def __init__(self, config):
        super().__init__()
        self.config, stated = config, config.side_stream
        self.ends = None if stated is None else SimpleNamespace(**(SIDE_STREAM | stated))
        if self.ends is not None:
            self.main_norm = outer_norm(config, self.ends.main_norm)
            self.side_norm = outer_norm(config, eps=self.ends.side_norm_eps)

    def begun(self, x):
        """The side stream before the first block, which x enters; None where there is none."""
        return None if self.ends is None else times(self.ends.start_scale, x)

    def forward(self, x, side):
        """What is left of the streams behind the last block."""
        x = out_of_blocks(self.config, x)
        if self.ends is None:
            return x
        side = self.side_norm(out_of_blocks(self.config, side))
        return times(self.ends.main_scale, self.main_norm(x)) + side
