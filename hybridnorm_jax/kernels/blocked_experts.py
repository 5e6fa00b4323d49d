"""The experts on any platform: rows sorted by expert, one matrix product per kernel and block of a group's rows.

A group is the rows of one expert. A block that ends past its group's end overlaps the next one, which starts where the
group ends and overwrites the rest.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.kernels.expert_rows import GroupSizes, Rows, pad_rows
from hybridnorm_jax.kernels.mean_turns import mean_turns
from hybridnorm_jax.kernels.precision import wide_dtype, wide_einsum
from hybridnorm_jax.kernels.swiglu import ExpertKernels, clamped_swiglu_gradients, swiglu, swiglu_gradients

Carry = TypeVar("Carry")
Hidden = Float[Array, "rows mlp"]
RowWeights = Float[Array, " rows"]

# Rows of a block, at most. On 2 CPU cores in float32, 64 experts top 8, 2048 tokens, embed 512, mlp 256, forward and
# backward take 457, 402, 447 and 447 ms with 64, 128, 256 and 512 rows: short blocks multiply more slowly, long ones
# fill up more of each group's end.
BLOCK = 128


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: the smallest power of two that holds the mean group, from 8 to BLOCK."""
    mean_group = -(-rows // experts)
    size = 8
    while size < min(mean_group, BLOCK):
        size *= 2
    return size


class Group(NamedTuple):
    """The rows of one expert."""

    expert: Int[Array, ""]
    start: Int[Array, ""]
    size: Int[Array, ""]


class _Block(NamedTuple):
    """Some consecutive rows of a group; `inside` tells which of them lie before the group's end."""

    start: Int[Array, ""]
    inside: Bool[Array, " block"]

    def read(self, array: Array) -> Array:
        """The block's rows of the array, zero past the group's end."""
        rows = jax.lax.dynamic_slice_in_dim(array, self.start, len(self.inside))
        inside = self.inside.reshape([-1] + [1] * (array.ndim - 1))
        return jnp.where(inside, rows, 0)

    def write(self, array: Array, rows: Array) -> Array:
        """The array with the block's rows replaced, those past the group's end too."""
        return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), self.start, 0)


def for_each_group(sizes: GroupSizes, visit: Callable[[Group, Carry], Carry], carry: Carry) -> Carry:
    """carry = visit(group, carry) for every expert that has rows."""
    starts = jnp.cumsum(sizes) - sizes
    present = jnp.argsort(sizes == 0, stable=True)

    def body(i: Array, carry: Carry) -> Carry:
        expert = present[i]
        return visit(Group(expert, starts[expert], sizes[expert]), carry)

    with mean_turns(len(sizes)):
        return jax.lax.fori_loop(0, jnp.count_nonzero(sizes), body, carry)


class _Cut(NamedTuple):
    """How groups are cut into blocks: rows of a block, and blocks of the mean group."""

    length: int
    mean_blocks: int


def _cut(rows: int, experts: int) -> _Cut:
    length = block_size(rows, experts)
    return _Cut(length, mean_blocks=-(-rows // (experts * length)))


def _for_each_block(group: Group, cut: _Cut, visit: Callable[[_Block, Carry], Carry], carry: Carry) -> Carry:
    """carry = visit(block, carry) for every block of a group."""
    length = cut.length

    def body(i: Array, carry: Carry) -> Carry:
        start = group.start + i * length
        inside = jnp.arange(length) < group.size - i * length
        return visit(_Block(start, inside), carry)

    with mean_turns(cut.mean_blocks):
        return jax.lax.fori_loop(0, -(-group.size // length), body, carry)


@jax.custom_vjp
def blocked(rows: Rows, row_weights: RowWeights, sizes: GroupSizes, kernels: ExpertKernels) -> Rows:
    """experts.apply_grouped_experts, but that rows past the last group are not looked at."""
    outputs, _ = _blocked_forward(rows, row_weights, sizes, kernels)
    return outputs


class _Products(NamedTuple):
    """What the forward pass fills in, block by block; rows are padded by one block."""

    gated: Hidden
    upped: Hidden
    outputs: Rows


class _Residuals(NamedTuple):
    """What the backward pass needs; `gated` and `upped` are padded by one block."""

    rows: Rows
    row_weights: RowWeights
    sizes: GroupSizes
    kernels: ExpertKernels
    gated: Hidden
    upped: Hidden


class _Gradients(NamedTuple):
    """What the backward pass fills in, or adds up, block by block; rows are padded by one block."""

    rows: Rows
    row_weights: RowWeights
    kernels: ExpertKernels


def _blocked_forward(
    rows: Rows, row_weights: RowWeights, sizes: GroupSizes, kernels: ExpertKernels
) -> tuple[Rows, _Residuals]:
    cut = _cut(len(rows), len(sizes))
    padded, padded_weights = pad_rows(rows, cut.length), pad_rows(row_weights, cut.length)

    def visit_group(group: Group, products: _Products) -> _Products:
        of_expert = kernels.of(group.expert)

        def visit(block: _Block, products: _Products) -> _Products:
            x = block.read(padded)
            gated = wide_einsum("bd,dm->bm", x, of_expert.gate).astype(x.dtype)
            upped = wide_einsum("bd,dm->bm", x, of_expert.up).astype(x.dtype)
            hidden = swiglu(gated, upped, block.read(padded_weights), kernels.clamp)
            outputs = wide_einsum("bm,md->bd", hidden, of_expert.down)
            return _Products(
                gated=block.write(products.gated, gated),
                upped=block.write(products.upped, upped),
                outputs=block.write(products.outputs, outputs),
            )

        return _for_each_block(group, cut, visit, products)

    hidden = jnp.zeros((len(padded), kernels.gate.shape[2]), rows.dtype)
    empty = _Products(gated=hidden, upped=hidden, outputs=jnp.zeros_like(padded))
    products = for_each_group(sizes, visit_group, empty)
    residuals = _Residuals(rows, row_weights, sizes, kernels, gated=products.gated, upped=products.upped)
    return products.outputs[: len(rows)], residuals


def _blocked_backward(residuals: _Residuals, d_outputs: Rows) -> tuple[Rows, RowWeights, None, ExpertKernels]:
    rows, row_weights, sizes, kernels, gated, upped = residuals
    cut = _cut(len(rows), len(sizes))
    inputs = _BackwardInputs(
        x=pad_rows(rows, cut.length),
        weights=pad_rows(row_weights, cut.length),
        d_output=pad_rows(d_outputs, cut.length),
        gated=gated,
        upped=upped,
    )
    zeros = jax.tree.map(jnp.zeros_like, _Gradients(inputs.x, inputs.weights, kernels))
    visit_group = functools.partial(_fill_in_group, inputs, kernels, cut)
    gradients = for_each_group(sizes, visit_group, zeros)
    return gradients.rows[: len(rows)], gradients.row_weights[: len(rows)], None, gradients.kernels


class _BackwardInputs(NamedTuple):
    """What the gradients are made of: the arrays of all rows, padded by one block, or those of one block."""

    x: Rows
    weights: RowWeights
    d_output: Rows
    gated: Hidden
    upped: Hidden


def _fill_in_group(
    inputs: _BackwardInputs, kernels: ExpertKernels, cut: _Cut, group: Group, gradients: _Gradients
) -> _Gradients:
    """`gradients` with those of one group's rows, and of its expert's kernels, filled in."""
    of_expert = kernels.of(group.expert)

    def visit(block: _Block, total: _Gradients) -> _Gradients:
        added = _block_gradients(jax.tree.map(block.read, inputs), of_expert)
        return _Gradients(
            rows=block.write(total.rows, added.rows),
            row_weights=block.write(total.row_weights, added.row_weights),
            kernels=jax.tree.map(jnp.add, total.kernels, added.kernels),
        )

    # The sums over an expert's blocks run in float32 at least, whatever the dtype of the result.
    nothing = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, wide_dtype(kernel.dtype)), of_expert)
    total = _for_each_block(group, cut, visit, gradients._replace(kernels=nothing))

    def put(stack: Array, gradient: Array) -> Array:
        return stack.at[group.expert].set(gradient.astype(stack.dtype))

    return total._replace(kernels=jax.tree.map(put, gradients.kernels, total.kernels))


def _block_gradients(inputs: _BackwardInputs, kernels: ExpertKernels) -> _Gradients:
    """The gradients of one block of one expert, in float32 at least.

    The forward pass of a block is, with the expert's kernels G (gate), U (up), D (down) and w the rows' weights,

        g = x G,    u = x U,    h = silu(g) u,    y = w h D.

    Given dy, with dh = w (dy D^T), du = dh silu(g) and dg = dh u silu'(g), the five gradients are

        dx = dg G^T + du U^T
        dw = the sum of (dy D^T) h over the hidden channels, row by row
        dG = x^T dg
        dU = x^T du
        dD = (w h)^T dy

    See swiglu.swiglu_gradients for du, dg, dw and h, and for experts that are clamped clamped_swiglu_gradients.
    """
    x, d_output = inputs.x, inputs.d_output
    wide, dtype = wide_dtype(x.dtype), x.dtype
    weights, gated, upped = inputs.weights.astype(wide)[:, None], inputs.gated.astype(wide), inputs.upped.astype(wide)
    d_weighted = wide_einsum("bd,md->bm", d_output, kernels.down)
    if kernels.clamp is None:
        gradients = swiglu_gradients(gated, upped, weights, d_weighted)
    else:
        gradients = clamped_swiglu_gradients(gated, upped, weights, d_weighted, kernels.clamp)
    hidden, d_gated, d_upped, d_weights = gradients
    hidden, d_gated, d_upped = (array.astype(dtype) for array in (hidden, d_gated, d_upped))
    d_x = wide_einsum("bm,dm->bd", d_gated, kernels.gate) + wide_einsum("bm,dm->bd", d_upped, kernels.up)
    d_down = wide_einsum("bm,bd->md", hidden, d_output)
    d_gate = wide_einsum("bd,bm->dm", x, d_gated)
    d_up = wide_einsum("bd,bm->dm", x, d_upped)
    return _Gradients(rows=d_x, row_weights=d_weights[:, 0], kernels=kernels.replace(gate=d_gate, up=d_up, down=d_down))


blocked.defvjp(_blocked_forward, _blocked_backward)
