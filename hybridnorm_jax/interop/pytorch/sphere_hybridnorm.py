"""Steps on a sphere in the place of sums, and learned numbers that are stored in another unit (nGPT, GeoNorm)."""

import torch
from torch import nn


def wide(x):
    """x in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x):
    """x / |x| over the last axis, in float32 at least; a vector of zeros stays one."""
    y = wide(x)
    square = y.square().sum(-1, keepdim=True)
    return (y * torch.rsqrt(torch.where(square == 0, 1.0, square))).to(x.dtype)


def along_chord(r, branch, step):
    """u(u(r) + step(u(branch) - u(r))), u(v) = v / |v|. nGPT (2410.01131)."""
    here, there = unit(r), unit(branch)
    return unit(here + step(there - here))


def along_sphere(r, step):
    """r cos t + |r| v / |v| sin t, t = |v| / |r|, v the part of the step that is orthogonal to r. GeoNorm."""
    x, ahead = wide(r), wide(step)
    square = x.square().sum(-1, keepdim=True)
    square = torch.where(square == 0, 1.0, square)
    ahead = ahead - (x * ahead).sum(-1, keepdim=True) / square * x
    turned = ahead.square().sum(-1, keepdim=True) / square
    # sin(t) / t is 1 at t = 0, where the root has no derivative.
    angle = torch.where(turned == 0, 1.0, turned).sqrt()
    sine = torch.where(turned == 0, 1.0, angle.sin() / angle)
    cosine = torch.where(turned == 0, 1.0, angle.cos())
    return (x * cosine + ahead * sine).to(r.dtype)


class StoredScale(nn.Module):
    """`start` * weight / `stored`: numbers that begin at `start`; the weight that stores them begins at `stored`."""

    def __init__(self, *shape, start=1.0, stored=1.0):
        super().__init__()
        self.factor, self.start = start / stored, stored
        self.weight = nn.Parameter(torch.full(shape, stored))

    def numbers(self):
        """These numbers, in float32 at least."""
        return wide(self.weight) * self.factor

    def forward(self, x):
        return (wide(x) * self.numbers()).to(x.dtype)


def logit_scales(config, count, width):
    """Of each of `count` logits the learned number of `sphere`, made of vectors of this width; else the identity."""
    return StoredScale(count, stored=width**-0.5) if config.sphere else nn.Identity()


class ChordStep(StoredScale):
    """The length of a step along a chord: the sizes of these numbers, one for each channel."""

    def numbers(self):
        return super().numbers().abs()
