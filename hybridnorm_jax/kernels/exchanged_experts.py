"""Experts split over devices that hold different tokens: the devices exchange rows, in rounds.

A device has one row for each choice of its tokens, sorted by expert, and so by the device that holds the expert. In
every round it sends each device the next `length` of the rows that are meant for it, and gets back what that device's
experts make of them. The devices agree on as many rounds as the most loaded pair of them needs in this step. So
buffers have the size of one round, whatever the routing is, and no row is ever dropped. A round is as long for all; of
what is empty in it products do nothing, but it is gathered and sent.

The backward pass goes through the same rounds. It sends rows once more, with their cotangents, and the experts'
gradients are summed over the rounds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.expert_dispatch import apply_experts_to_segments
from hybridnorm_jax.kernels.expert_rows import GroupSizes, RowOrder, Rows, Tokens, pad_rows, sort_by_expert
from hybridnorm_jax.kernels.mean_turns import mean_turns
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.segments import Segments
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.mesh.split_axes import Axes, parts

# Rounds that a balanced step takes. With more, buffers are smaller, and the last round, which is full for the most
# loaded pair of devices only, is shorter. With fewer, kernels and their gradients are read and written less often.
ROUNDS = 4
_TILE = 128
Carry = TypeVar("Carry")
TokenWeights = Float[Array, "tokens k"]


def round_length(rows: int, devices: int) -> int:
    """Rows that a device sends to each device in a round, when it has `rows` of them in all."""
    length = -(-rows // (devices * ROUNDS))
    tile = _TILE if length >= _TILE else 8
    return tile * -(-length // tile)


class _Exchange(NamedTuple):
    """Among whom rows are exchanged, and how.

    Attributes:
      axes: of the mesh; devices that differ in these exchange rows.
      devices: how many these are.
      length: rows of a round, from each device to each.
      balanced: rounds of a balanced step.
      dispatch: what computes the experts.
    """

    axes: Axes
    devices: int
    length: int
    balanced: int
    dispatch: str


class _Routing(NamedTuple):
    """Where the rows of this device go, and what comes to it.

    Attributes:
      order: of this device's rows, sorted by expert.
      count: rows for each device.
      start: the first of them in that order.
      kept: the first of them in the array that keeps what comes back: there each device's rows begin a round's stretch.
      place_of_choice: in that array, the row of each choice.
      incoming: rows that come from each device for each expert here.
      rounds: how many there are, on all devices.
    """

    order: RowOrder
    count: Int[Array, " devices"]
    start: Int[Array, " devices"]
    kept: Int[Array, " devices"]
    place_of_choice: Int[Array, "tokens k"]
    incoming: Int[Array, "devices experts"]
    rounds: Int[Array, ""]


def apply_exchanged_experts(
    x: Tokens,
    kernels: ExpertKernels,
    weights: TokenWeights,
    chosen: Int[Array, "tokens k"],
    *,
    axes: Axes,
    different: Axes,
    dispatch: str,
) -> Tokens:
    """expert_dispatch.apply_experts on one device of a jax.shard_map, which has a share of experts and of tokens.

    Memory: O(tokens k) rows, whatever is chosen.

    Args:
      kernels: of the experts here: device number i along `axes` has the i-th stretch of all experts.
      chosen: of all experts.
      axes: of the mesh, that split the experts; devices along them have different tokens.
      different: all axes of the mesh along which tokens differ.
    """
    devices, experts = parts(axes), len(kernels.gate)
    rows = chosen.size
    length = round_length(rows, devices)
    exchange = _Exchange(axes, devices, length, balanced=-(-rows // (devices * length)), dispatch=dispatch)
    order, sizes = sort_by_expert(chosen, devices * experts)
    routing = _route(exchange, order, sizes, chosen // experts, different)
    return _exchanged(exchange, routing, x, weights, kernels)


def _route(
    exchange: _Exchange, order: RowOrder, sizes: GroupSizes, device_of_choice: Array, different: Axes
) -> _Routing:
    per_device = sizes.reshape(exchange.devices, -1)
    count = per_device.sum(1)
    start = jnp.cumsum(count) - count
    rounds = -(-count // exchange.length)
    kept = exchange.length * (jnp.cumsum(rounds) - rounds)
    return _Routing(
        order=order,
        count=count,
        start=start,
        kept=kept,
        place_of_choice=order.row_of_choice + (kept - start)[device_of_choice],
        incoming=_all_to_all(per_device, exchange),
        rounds=jax.lax.pmax(rounds.max(), different),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(
    exchange: _Exchange, routing: _Routing, x: Tokens, weights: TokenWeights, kernels: ExpertKernels
) -> Tokens:
    row_weights = _rows_in_order(weights, routing.order)

    def visit(number: Array, outputs: Rows) -> Rows:
        rows, at_rows = _send_rows(exchange, routing, number, x), _send(exchange, routing, number, row_weights)
        made = _experts(exchange, routing, number)(rows, at_rows, kernels)
        return _keep(exchange, routing, number, outputs, _send_back(made, exchange))

    return _collect(_for_each_round(exchange, routing, visit, _nothing_kept(exchange, x, chosen=weights)), routing)


class _Residuals(NamedTuple):
    routing: _Routing
    x: Tokens
    weights: TokenWeights
    kernels: ExpertKernels


class _Gradients(NamedTuple):
    """What the rounds of the backward pass fill in, or add up in float32 at least."""

    rows: Rows
    row_weights: Float[Array, " rows"]
    kernels: ExpertKernels


def _forward(
    exchange: _Exchange, routing: _Routing, x: Tokens, weights: TokenWeights, kernels: ExpertKernels
) -> tuple[Tokens, _Residuals]:
    return _exchanged(exchange, routing, x, weights, kernels), _Residuals(routing, x, weights, kernels)


def _backward(
    exchange: _Exchange, residuals: _Residuals, d_y: Tokens
) -> tuple[None, Tokens, TokenWeights, ExpertKernels]:
    routing, x, weights, kernels = residuals
    row_weights = _rows_in_order(weights, routing.order)

    def visit(number: Array, gradients: _Gradients) -> _Gradients:
        rows, at_rows = _send_rows(exchange, routing, number, x), _send(exchange, routing, number, row_weights)
        d_made = _send_rows(exchange, routing, number, d_y)
        _, pull = jax.vjp(_experts(exchange, routing, number), rows, at_rows, kernels)
        d_rows, d_weights, d_kernels = pull(d_made)
        return _Gradients(
            rows=_keep(exchange, routing, number, gradients.rows, _send_back(d_rows, exchange)),
            row_weights=_keep(exchange, routing, number, gradients.row_weights, _send_back(d_weights, exchange)),
            kernels=jax.tree.map(lambda total, each: total + each.astype(total.dtype), gradients.kernels, d_kernels),
        )

    none = _Gradients(
        rows=_nothing_kept(exchange, x, chosen=weights),
        row_weights=_nothing_kept(exchange, row_weights, chosen=weights),
        kernels=jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, wide_dtype(kernel.dtype)), kernels),
    )
    gradients = _for_each_round(exchange, routing, visit, none)
    d_weights = gradients.row_weights[routing.place_of_choice]
    d_kernels = jax.tree.map(lambda total, kernel: total.astype(kernel.dtype), gradients.kernels, kernels)
    return None, _collect(gradients.rows, routing), d_weights, d_kernels


_exchanged.defvjp(_forward, _backward)


def _for_each_round(
    exchange: _Exchange, routing: _Routing, visit: Callable[[Array, Carry], Carry], carry: Carry
) -> Carry:
    """carry = visit(number, carry) for every round."""
    with mean_turns(exchange.balanced):
        return jax.lax.fori_loop(0, routing.rounds, visit, carry)


def _rows_in_order(weights: TokenWeights, order: RowOrder) -> Float[Array, " rows"]:
    return weights.reshape(-1)[order.choice_of_row]


def _send(exchange: _Exchange, routing: _Routing, number: Array, sorted_rows: Array) -> Array:
    """Of an array in the order of the rows, what arrives here in this round; past a device's rows it is of others."""
    return _all_to_all(_stretches(exchange, routing, number, sorted_rows), exchange).reshape(-1)


def _send_rows(exchange: _Exchange, routing: _Routing, number: Array, tokens: Tokens) -> Rows:
    """The same of the tokens that made the choices."""
    _, k = routing.place_of_choice.shape
    choices = _stretches(exchange, routing, number, routing.order.choice_of_row)
    return _all_to_all(tokens[choices // k], exchange).reshape(-1, tokens.shape[1])


def _stretches(exchange: _Exchange, routing: _Routing, number: Array, sorted_rows: Array) -> Array:
    """For each device the numbers of this round's rows."""
    padded = pad_rows(sorted_rows, exchange.length)
    starts = jnp.minimum(routing.start + number * exchange.length, len(sorted_rows))
    slices = [jax.lax.dynamic_slice_in_dim(padded, starts[i], exchange.length) for i in range(exchange.devices)]
    return jnp.stack(slices)


def _experts(exchange: _Exchange, routing: _Routing, number: Array) -> Callable[..., Rows]:
    """(rows, row_weights, kernels) -> what the experts here make of the rows of this round."""
    end = jnp.cumsum(routing.incoming, axis=1)
    stretch = exchange.length * jnp.arange(exchange.devices, dtype=jnp.int32)[:, None]

    def placed(row: Int[Array, "devices experts"]) -> Int[Array, " segments"]:
        return (stretch + jnp.clip(row - number * exchange.length, 0, exchange.length)).reshape(-1)

    devices, experts = routing.incoming.shape
    segments = Segments(
        start=placed(end - routing.incoming),
        end=placed(end),
        expert=jnp.tile(jnp.arange(experts, dtype=jnp.int32), devices),
    )

    def function(rows: Rows, row_weights: Float[Array, " rows"], kernels: ExpertKernels) -> Rows:
        return apply_experts_to_segments(rows, row_weights, segments, kernels, dispatch=exchange.dispatch)

    return function


def _send_back(rows: Array, exchange: _Exchange) -> Array:
    return _all_to_all(rows.reshape(exchange.devices, exchange.length, *rows.shape[1:]), exchange)


def _nothing_kept(exchange: _Exchange, like: Array, chosen: Array) -> Array:
    """Room for all rows, each device's from a round's beginning, and for one round of what nobody keeps."""
    rounds = chosen.size // exchange.length + exchange.devices + 1
    return jnp.zeros((rounds * exchange.length, *like.shape[1:]), like.dtype)


def _keep(exchange: _Exchange, routing: _Routing, number: Array, kept: Array, came: Array) -> Array:
    """`kept` with what came back from each device in this round."""
    nowhere = len(kept) - exchange.length
    begin = number * exchange.length
    places = jnp.where(begin < routing.count, routing.kept + begin, nowhere)
    for device in range(exchange.devices):
        kept = jax.lax.dynamic_update_slice_in_dim(kept, came[device].astype(kept.dtype), places[device], 0)
    return kept


def _collect(kept: Rows, routing: _Routing) -> Tokens:
    """For each token the sum of its rows, in float32 at least."""
    return kept[routing.place_of_choice].sum(1, dtype=wide_dtype(kept.dtype)).astype(kept.dtype)


def _all_to_all(array: Array, exchange: _Exchange) -> Array:
    """Stretch i of the first dimension goes to device i; stretch i of the result is from device i."""
    return jax.lax.all_to_all(array, exchange.axes, split_axis=0, concat_axis=0, tiled=True)
