"""One optimizer step and one evaluation step, as pure functions of state and batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array

from hybridnorm_jax.equivalence.forward_pass import collected
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.mesh.split_axes import parts, split_axes
from hybridnorm_jax.model.block import DEFECT
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.loss import LossSums, chunked_cross_entropy, cross_entropy
from hybridnorm_jax.model.moe import ROUTER, RouterStatistics
from hybridnorm_jax.model.signal_measures import PROBE
from hybridnorm_jax.training import router_balance as routing
from hybridnorm_jax.training.anomalies import anomaly_metrics, judge, keep_where
from hybridnorm_jax.training.state import TrainState

Convert = Callable[[Any], Any]
Sums = tuple[LossSums, RouterStatistics | None]
Batch = dict[str, Array]  # tokens, targets, weights, and with documents kept apart segment_ids, positions


def loss_sums(
    model: Decoder,
    params: Any,
    batch: Batch,
    chunk: int | None,
    dropout_key: Array | None = None,
    collect: tuple[str, ...] = (),
    probes: Any | None = None,
) -> tuple[LossSums, dict[str, Any]]:
    """The loss of one batch (sequences x positions), as sums, and what the model sows.

    Args:
      chunk: positions whose logits are held at a time; None: all.
      dropout_key: None switches dropout off.
      collect: the collections to return.
      probes: the collection PROBE of signal_measures.py, to take gradients with respect to.
    """
    inputs = document_inputs(batch) | {"mutable": list(collect)}
    if dropout_key is not None and model.config.dropout > 0:
        inputs |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    variables = {"params": params}
    probed = {} if probes is None else {PROBE: probes}
    if chunk is None:
        logits, sown = model.apply(variables | probed, batch["tokens"], **inputs)
        return cross_entropy(logits, batch["targets"], batch["weights"]), sown
    # Gathered once, and its gradient reduced once, instead of in every chunk.
    module, name, axes = ("head", "kernel", (None, "vocab"))
    if model.config.tie_embeddings:
        module, name, axes = ("token_embedding", "embedding", ("vocab", None))
    gathered = nn.with_logical_constraint(params[module][name], axes)
    variables = {"params": params | {module: params[module] | {name: gathered}}}
    hidden, sown = model.apply(variables | probed, batch["tokens"], method="hidden", **inputs)
    sums = chunked_cross_entropy(
        lambda piece: model.apply(variables, piece, method="logits"),
        hidden,
        batch["targets"],
        batch["weights"],
        chunk,
        stretches=parts(split_axes("seq", hidden.shape[1])),
    )
    return sums, sown


def document_inputs(batch: Batch) -> Batch:
    """What keeps documents apart, where the batch has it."""
    return {name: batch[name] for name in ("positions", "segment_ids") if name in batch}


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    chunk: int | None = None,
    z_loss: float = 0.0,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
    balance_bias_rate: float = 0.0,
    skip_spikes_sigma: float | None = None,
    convert: Convert | None = None,
    measure: Callable[[Any, Batch], Measured] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array], Measured]]:
    """(state, batch) -> (state after one step, metrics, measured invariants).

    The batch's arrays are (microbatches, sequences, positions). The gradient is that of
    sum(nll + z_loss * log(Z)^2) / sum(weights) over all microbatches: sums are accumulated and divided once, so
    microbatches with unequal numbers of targets give what one large batch gives.

    With experts, balance_loss and router_z_loss weigh the routers' losses, summed over the layers. A
    microbatch's are taken over all its tokens on all devices and weighted by its number of targets. The balance loss
    is no sum over tokens: that of a large batch is not the mean of its microbatches', so accumulation changes it.

    Where the loss or the gradient is NaN or infinite, whichever microbatch it came from, or the loss is a spike
    (anomalies.judge), parameters, moments and balance biases stay bit for bit as they are; the step counts.

    Metrics: loss (nats per target, without any other term), grad_norm (before clipping), learning_rate, z_loss (its
    weighted term) where there is one, those of anomalies.anomaly_metrics, and with experts those of
    routing.router_metrics.

    Args:
      balance_bias_rate: of routing.move_balance_biases, after the optimizer's update; for model.balance_bias.
      skip_spikes_sigma: see anomalies.judge; None: only what is not finite is skipped.
      convert: the state's parameters -> those of `model`, for a model that is trained as another form of itself.
      measure: (the state's parameters, one sequence) -> invariants to return; None: the last result is empty.
    """
    dropout_root = jax.random.key(seed)
    defects = (DEFECT,) if measure is not None and convert is not None else ()
    routed = model.config.num_experts > 0
    weights = {"balance": balance_loss, "z": router_z_loss}

    def objective(params, microbatch, key):
        sums, sown = loss_sums(model, params, microbatch, chunk, key, (*defects, *[ROUTER] * routed))
        total = sums.nll + z_loss * sums.z
        if not routed:
            return total, ((sums, None), sown)
        routers = jax.tree.map(lambda mean: sums.weight.astype(mean.dtype) * mean, routing.all_layers(sown))
        total += routing.router_loss(routers, **weights)
        return total, ((sums, routers), {name: sown[name] for name in defects})

    def train_step(state, batch):
        key = jax.random.fold_in(dropout_root, state.step)
        (sums, routers), sown, grads = _gradient(objective, convert, state.params, batch, key)
        weight = jnp.where(sums.weight > 0, sums.weight, 1)  # no target at all: loss and gradient are zero
        grads = jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums.nll / weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        if z_loss:
            metrics["z_loss"] = z_loss * sums.z / weight
        if routed:
            routers = jax.tree.map(lambda total: total / weight.astype(total.dtype), routers)
            metrics |= routing.router_metrics(routers, **weights)
        if model.config.balance_bias:
            params = routing.move_balance_biases(params, routers.fraction, balance_bias_rate)
        skip, anomalies = judge(state.anomalies, metrics["loss"], metrics["grad_norm"], sigma=skip_spikes_sigma)
        metrics |= anomaly_metrics(anomalies)
        params, opt_state = keep_where(skip, (state.params, state.opt_state), (params, opt_state))
        measured = {} if measure is None else measure(state.params, jax.tree.map(lambda x: x[0, :1], batch))
        if defects:
            measured |= {"trained": jax.vmap(partial(collected, collection=DEFECT))(sown).max(0)}
        return TrainState(state.step + 1, params, opt_state, anomalies), metrics, measured

    return train_step


def _gradient(
    objective: Callable, convert: Convert | None, params: Any, batch: Batch, key: Array
) -> tuple[Sums, Any, Any]:
    """As _accumulate, of objective(convert(params), ...)."""
    if convert is None:
        return _accumulate(objective, params, batch, key)
    # Converted once, and the gradient pulled back once, however many microbatches there are. The barriers keep XLA from
    # computing either again where it is read (1,024 tokens on a CPU: 1.5 times Pre-LN, with them 1.1).
    converted, pull_back = jax.vjp(convert, params)
    sums, sown, grads = _accumulate(objective, jax.lax.optimization_barrier(converted), batch, key)
    return sums, sown, pull_back(jax.lax.optimization_barrier(grads))[0]


def _accumulate(objective: Callable, params: Any, batch: Batch, key: Array) -> tuple[Sums, Any, Any]:
    """(sums, what was sown with the microbatches in front, gradient of the summed objective)."""
    gradient = jax.value_and_grad(objective, has_aux=True)
    count = batch["tokens"].shape[0]
    if count == 1:
        (_, (sums, sown)), grads = gradient(params, jax.tree.map(lambda x: x[0], batch), key)
        return sums, jax.tree.map(lambda x: x[None], sown), grads

    def body(carry, piece):
        number, microbatch = piece
        (_, (sums, sown)), grads = gradient(params, microbatch, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, (sums, grads)), sown

    first = jax.tree.map(lambda x: x[0], batch)
    (_, (shapes, _)), _ = jax.eval_shape(gradient, params, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.tree.map(jnp.zeros_like, params)
    (sums, grads), sown = jax.lax.scan(body, zeros, (jnp.arange(count), batch))
    return sums, sown, grads


def make_eval_step(
    model: Decoder, *, chunk: int | None = None, convert: Convert | None = None
) -> Callable[[Any, Batch], LossSums]:
    """(params, batch) -> loss sums of that batch, without dropout; `convert` as in make_train_step."""
    return lambda params, batch: loss_sums(model, params if convert is None else convert(params), batch, chunk)[0]
