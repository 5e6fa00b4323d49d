"""Attention on a mesh: how sequences, positions and heads are split among the devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads
from hybridnorm_jax.kernels.score_rules import ScoreRules
from hybridnorm_jax.mesh.each_device import on_each_device
from hybridnorm_jax.mesh.split_axes import Axes, parts, split_axes


def sequence_axes(seq: int) -> Axes:
    """The axes of the mesh in force that split a sequence of this length; none where their halves do not divide it."""
    axes = split_axes("seq", seq)
    return axes if seq % (2 * parts(axes)) == 0 else ()


def rules_on_mesh(rules: ScoreRules, inputs: AttentionInputs, sequence: Axes) -> ScoreRules:
    """How on_mesh splits the arrays of these rules; `sequence`: the mesh axes that split the positions."""
    heads = PartitionSpec(split_axes("heads", inputs.query.shape[2]))
    alibi = rules.alibi
    if alibi is not None:
        positions = alibi.key_positions
        if positions is not None:
            rows = split_axes("batch", positions.shape[0]) if positions.shape[0] > 1 else None
            positions = PartitionSpec(rows, sequence)
        alibi = dataclasses.replace(alibi, slopes=heads, key_positions=positions)
    return dataclasses.replace(
        rules,
        layer_window=None if rules.layer_window is None else PartitionSpec(),
        sinks=None if rules.sinks is None else heads,
        alibi=alibi,
    )


def on_mesh(
    local: Callable[..., Heads],
    inputs: AttentionInputs,
    *,
    sequence: Axes = (),
    kernel: Any = None,
    kernel_specs: Any = None,
) -> Heads:
    """jax.shard_map of `local` over sequences and heads, as the rules split them, and over positions.

    Args:
      local: computes one device's share: local(inputs), or local(kernel, inputs) where a kernel is given.
      sequence: the mesh axes that split the positions.
      kernel: a tree of arrays that are split, too.
      kernel_specs: its PartitionSpecs.
    """
    query, key, value, segment_ids = inputs
    rows, columns = split_axes("batch", query.shape[0]), split_axes("heads", query.shape[2])
    # As many key heads as the axes divide; query head h still reads the same values.
    copies = parts(columns) // math.gcd(parts(columns), key.shape[2])
    inputs = AttentionInputs(query, jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2), segment_ids)
    heads_spec = PartitionSpec(rows, sequence, columns)
    specs = AttentionInputs(heads_spec, heads_spec, heads_spec, PartitionSpec(rows, sequence))
    if kernel is None:
        return on_each_device(local, in_specs=(specs,), out_specs=heads_spec)(inputs)
    return on_each_device(local, in_specs=(kernel_specs, specs), out_specs=heads_spec)(kernel, inputs)
