"""How a branch grows from nothing to its full size while the model is trained.

    share = min(step / length, 1)

`step` counts the optimizer's updates before this one, and `length` is the number of updates after which the branch is
whole. The share is one more factor of the branch, beside the constants of its placement.

Nothing here imports JAX, so that schemes can be listed at once; formula.shares computes the same with arrays.
"""

import dataclasses

import numpy as np

from hybridnorm_jax.model.placement import BlockPlacement, BranchRamp, SublayerPlacement

# This project's choice where a configuration does not say.
DEFAULT_RAMP_STEPS = 1000


def ramp_lengths(ramp: BranchRamp, num_layers: int, ramp_steps: int) -> tuple[float, ...]:
    """Of every layer, first to last, how many updates its branches take to become whole.

    "by_depth"   the L layers at equal distances from floor(T / L) to T = ramp_steps, as in the code of ProRes
                 (2603.05369): linspace(T // L, T, L)
    "together"   T in every layer. BranchNorm (2305.02790)
    """
    match ramp:
        case "by_depth":
            return tuple(np.linspace(ramp_steps // num_layers, ramp_steps, num_layers).tolist())
        case "together":
            return (float(ramp_steps),) * num_layers
    raise ValueError(f"branch_ramp={ramp!r}: there is none")


def grown(placement: BlockPlacement, layer: int, num_layers: int, *, ramp_steps: int, step: int) -> BlockPlacement:
    """The placement of a layer as it is at a step: the share is in branch_scale, and nothing grows any more."""

    def at_step(sublayer: SublayerPlacement) -> SublayerPlacement:
        if sublayer.branch_ramp is None:
            return sublayer
        length = ramp_lengths(sublayer.branch_ramp, num_layers, ramp_steps)[layer]
        scale = sublayer.branch_scale * min(step / length, 1.0)
        return dataclasses.replace(sublayer, branch_ramp=None, branch_scale=scale)

    return dataclasses.replace(
        placement, attention=at_step(placement.attention), feed_forward=at_step(placement.feed_forward)
    )
