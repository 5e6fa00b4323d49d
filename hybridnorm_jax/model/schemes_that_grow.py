"""Schemes whose branches grow with the training step: ramps.py says how, and model.ramp_steps how long it takes.

In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output, L the number of
blocks, l = layer + 1, and t the training step.
"""

import dataclasses

from hybridnorm_jax.model.placement import BlockPlacement, BranchRamp
from hybridnorm_jax.model.scheme import scheme
from hybridnorm_jax.model.schemes_of_hybridnorm import post, pre
from hybridnorm_jax.model.schemes_of_others import deepnorm, sandwich

_PRORES = {"source": "ProRes (2603.05369), modeling_llama.py", "checked": "authors' code"}


def growing(placement: BlockPlacement, ramp: BranchRamp) -> BlockPlacement:
    """The placement, both of its branches times a share that grows from 0 to 1."""
    return dataclasses.replace(
        placement,
        attention=dataclasses.replace(placement.attention, branch_ramp=ramp),
        feed_forward=dataclasses.replace(placement.feed_forward, branch_ramp=ramp),
    )


@scheme("prores_pre", **_PRORES)
def prores_pre(layer: int, num_layers: int) -> BlockPlacement:
    """pre, the branches of layer l times min(t / T_l, 1), T_l growing with l up to T. ProRes (2603.05369)."""
    return growing(pre(layer, num_layers), "by_depth")


@scheme("prores_post", **_PRORES)
def prores_post(layer: int, num_layers: int) -> BlockPlacement:
    """post_final_norm with the shares of prores_pre. ProRes."""
    return growing(post(layer, num_layers), "by_depth")


@scheme("prores_sandwich", **_PRORES)
def prores_sandwich(layer: int, num_layers: int) -> BlockPlacement:
    """sandwich with the shares of prores_pre. ProRes."""
    return growing(sandwich(layer, num_layers), "by_depth")


@scheme("prores_deepnorm", initializer="deepnorm", **_PRORES)
def prores_deepnorm(layer: int, num_layers: int) -> BlockPlacement:
    """deepnorm_final_norm with the shares of prores_pre. ProRes."""
    return growing(deepnorm(layer, num_layers), "by_depth")


@scheme("branch_norm", final_norm=False, source="BranchNorm (2305.02790), from memory", checked="equation only")
def branch_norm(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + a Attn(X)); X' = N(Y + a FFN(Y)), a = min(t / T, 1). BranchNorm (2305.02790).

    That a grows in a straight line is how this project remembers the paper; no code of the authors was found.
    """
    return growing(post(layer, num_layers), "together")
