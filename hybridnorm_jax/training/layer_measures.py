"""Per-layer measures of signal, gradients, parameters and updates, on a few sequences and beside the training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.step import Batch, Convert, batch_loss

Measures = dict[str, Array]


def measure_signal(
    model: Decoder,
    params: Any,
    batch: Batch,
    *,
    chunk: int | None = None,
    convert: Convert | None = None,
    step: Array | None = None,
) -> tuple[Measures, Any]:
    """(what the layers do with one batch, the gradient of its loss), without dropout.

    The loss is the mean of -log p over the batch's targets, in nats, without any other term.

    Measures, by name, first layer first:
      stream_rms, token_similarity: see signal_measures; (layers + 1,), the first after the embedding (and its norm),
        then after every block.
      stream_gradient: |d loss / d x| over the whole batch (Frobenius), for the same streams x, (layers + 1,). One over
        the root of the number of targets is in it, so only batches of one size compare.
      side_stream_rms, side_token_similarity, side_stream_gradient: those of the side stream, where the scheme has one.
      attention_entropy, largest_logit: see kernels.blockwise_attention.attention_statistics, (layers,).
      gradient/<group>: norms of d loss / d parameters, see layer_norms.

    Args:
      batch: sequences x positions.
      chunk, convert, step: as in training.step; the gradient is that of the parameters before `convert`.
    """
    dtype = jnp.promote_types(model.config.dtype, jnp.float32)
    prefixes = ("", "side_") if model.config.side_stream is not None else ("",)

    def zeros(shape: tuple[int, ...]) -> dict[str, Array]:
        return {f"{prefix}square": jnp.zeros(shape, dtype) for prefix in prefixes}

    probes = zeros(()) | {f"run_{i}": zeros((run.length,)) for i, run in enumerate(model.config.runs)}

    def loss(params, probes):
        variables = {"params": params if convert is None else convert(params), PROBE: probes}
        nll, sums, sown = batch_loss(model, variables, batch, chunk=chunk, step=step, collect=(SIGNAL,))
        return nll / jnp.where(sums.weight > 0, sums.weight, 1), sown[SIGNAL]

    (_, sown), (gradient, squares) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, probes)
    measures = {}
    for prefix in prefixes:
        for name in ("stream_rms", "token_similarity"):
            measures[f"{prefix}{name}"] = _by_layer(sown, f"{prefix}{name}")
        measures[f"{prefix}stream_gradient"] = jnp.sqrt(_by_layer(squares, f"{prefix}square"))
    attention = {name: layers.get("attention", {}) for name, layers in sown.items() if name.startswith("run_")}
    measures |= {name: _by_layer(attention, name) for name in ("attention_entropy", "largest_logit")}
    return measures | _named("gradient", layer_norms(gradient)), gradient


def layer_norms(tree: Any) -> dict[str, Float[Array, "*layers"]]:
    """Euclidean norms of a tree like a Decoder's parameters, by group.

    A group is a module: its kernel, bias and scale together. Inside the blocks its norms are (layers,), NaN where a
    layer has no such module; "block" is all of a block. Outside of them, as for "token_embedding", it is one number.
    """
    layered: dict[str, dict[int, Array]] = {}
    single: dict[str, Array] = {}
    lengths: dict[int, int] = {}
    for path, leaf in flatten_dict(tree).items():
        square = jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
        in_module = path[-1] in ("kernel", "bias", "scale", "embedding") or path[-2].endswith("norm")
        parts = path[:-1] if in_module else path
        if not path[0].startswith("run_"):
            group = "/".join(parts)
            single[group] = single.get(group, 0) + square.sum()
            continue
        run = int(path[0].removeprefix("run_"))
        lengths[run] = leaf.shape[0]
        for group in ("/".join(parts[1:]), "block"):
            sums = layered.setdefault(group, {})
            sums[run] = sums.get(run, 0) + square.sum(range(1, leaf.ndim))

    def joined(sums: dict[int, Array]) -> Array:
        absent = {run: jnp.full(length, jnp.nan) for run, length in lengths.items()}
        return jnp.concatenate([sums.get(run, absent[run]) for run in sorted(lengths)])

    norms = {group: joined(sums) for group, sums in layered.items()} | single
    return {group: jnp.sqrt(square) for group, square in norms.items()}


def make_watch(
    model: Decoder,
    optimizer_of: Callable[[StepNumbers], optax.GradientTransformation],
    *,
    shares: int,
    sequences: int,
    chunk: int | None = None,
    convert: Convert | None = None,
) -> Callable[[TrainState, Batch, StepNumbers], Measures]:
    """(state, batch of a training step, numbers of the run) -> measure_signal of a few of its sequences.

    And besides, by group:

      parameter/<group>: norms of the parameters.
      update/<group>: norms of what the optimizer would add to them, were this gradient that of the whole batch.

    Nothing of the state changes.

    Args:
      optimizer_of: numbers -> the optimizer.
      shares: the devices' equal shares of a microbatch.
      sequences: how many of each share in the first microbatch are taken.
    """

    def some(array: Array) -> Array:
        # The first of every share, so that no device needs another's.
        microbatch, positions = array[0], array.shape[2]
        first = microbatch.reshape(shares, -1, positions)[:, :sequences]
        return first.reshape(-1, positions)

    def watch(state: TrainState, batch: Batch, numbers: StepNumbers) -> Measures:
        measures, gradient = measure_signal(
            model, state.params, jax.tree.map(some, batch), chunk=chunk, convert=convert, step=state.step
        )
        updates, _ = optimizer_of(numbers).update(gradient, state.opt_state, state.params)
        return measures | _named("parameter", layer_norms(state.params)) | _named("update", layer_norms(updates))

    return watch


def _named(kind: str, norms: dict[str, Array]) -> Measures:
    return {f"{kind}/{group}": values for group, values in norms.items()}


def _by_layer(values: Any, name: str) -> Array:
    """What {name: ..., run_0: {name: ...}, ...} holds, first the value outside of the runs, then layer by layer."""
    numbers = sorted(int(key.removeprefix("run_")) for key in values if key.startswith("run_"))
    outside = [_sown(values[name])[None]] if name in values else []
    return jnp.concatenate([*outside, *(_sown(values[f"run_{number}"][name]) for number in numbers)])


def _sown(value: Any) -> Array:
    """A value that was sown, which stands in a tuple, or one that was not."""
    if isinstance(value, tuple):
        (value,) = value
    return value
