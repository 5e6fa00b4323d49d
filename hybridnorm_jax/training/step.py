"""One optimizer step and one evaluation step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config_fields import present
from hybridnorm_jax.equivalence.forward_pass import collected
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.mesh.split_axes import parts, split_axes
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.loss import (
    LossSums,
    chunked_cross_entropy,
    cross_entropy,
    gathered_head,
    kernel_head,
    token_logits_of,
)
from hybridnorm_jax.model.moe import RouterStatistics
from hybridnorm_jax.model.watched_streams import DEFECT, ROUTER
from hybridnorm_jax.training import router_balance
from hybridnorm_jax.training.anomalies import all_finite, anomaly_metrics, judge, keep_where
from hybridnorm_jax.training.optimizers.rates import schedule_of
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.parameter_average import next_average
from hybridnorm_jax.training.state import TrainState

Convert = Callable[[Any], Any]
OptimizerOf = Callable[[StepNumbers], optax.GradientTransformation]
Measure = Callable[[Any, dict[str, Array]], Measured]
# Names in the compiled program, by which planning/model_parts.py tells what belongs to what.
LOSS_SCOPE, OPTIMIZER_SCOPE = "loss", "optimizer"
Batch = dict[str, Array]  # tokens, targets, weights, and with documents kept apart segment_ids, positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a training step does besides following the gradient of the mean loss.

    Attributes:
      optimizer: of the run; what of it is in the step's numbers is taken from there.
      chunk: positions whose logits are held at a time; None: all.
      kernel: what computes the loss from what the head reads, see model.loss.token_logits_of.
      z_loss: weight of log(Z)^2 of every target.
      balance_loss, router_z_loss: weights of the routers' losses, summed over the layers.
      skip_spikes_sigma: see anomalies.judge; None: only what is not finite is skipped.
    """

    optimizer: OptimizerSection
    chunk: int | None = None
    kernel: str = "xla"
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    skip_spikes_sigma: float | None = None


class Totals(NamedTuple):
    """Sums over the targets of a batch: of the loss, and of the routers' statistics (None without experts)."""

    loss: LossSums
    routers: RouterStatistics | None


# (parameters, microbatch, dropout key) -> (summed loss, (sums, what the model sowed))
Objective = Callable[[Any, Batch, Array], tuple[Array, tuple[Totals, dict[str, Any]]]]


class BatchLoss(NamedTuple):
    """The loss of one batch.

    Attributes:
      total: nll + z_loss * z. Where the loss is computed in chunks, it alone has a gradient.
      sums: over its targets.
      sown: what the model sowed.
    """

    total: Array
    sums: LossSums
    sown: dict[str, Any]


def batch_loss(
    model: Decoder,
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    chunk: int | None,
    kernel: str = "xla",
    z_loss: float = 0.0,
    dropout_key: Array | None = None,
    step: Array | None = None,
    collect: tuple[str, ...] = (),
) -> BatchLoss:
    """The loss of one batch (sequences x positions).

    Args:
      variables: of the model: "params", and maybe PROBE of signal_measures.py, to take gradients with respect to.
      chunk: positions whose logits are held at a time; None: all.
      kernel: see model.loss.token_logits_of.
      z_loss: weight of the sum z in the total.
      dropout_key: None switches dropout off.
      step: of training; needed where the model's branches grow with it, and else not read.
      collect: the collections to return.
    """
    inputs = document_inputs(batch) | {"mutable": list(collect)}
    if model.config.grows:
        inputs["step"] = step
    if dropout_key is not None and model.config.dropout > 0:
        inputs |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    with jax.named_scope(LOSS_SCOPE):
        head = gathered_head(model.config, variables["params"])
    variables = {**variables, "params": {**variables["params"], **head}}
    if kernel != "xla":
        head, inputs["rows"] = kernel_head(model.config, head, batch["tokens"])
    hidden, sown = model.apply(variables, batch["tokens"], method="hidden", **inputs)
    with jax.named_scope(LOSS_SCOPE):
        logits_of = token_logits_of(model, kernel)
        if chunk is None:
            sums = cross_entropy(logits_of(head, hidden, batch["targets"]), batch["weights"])
            return BatchLoss(total=sums.nll + z_loss * sums.z, sums=sums, sown=sown)
        total, sums = chunked_cross_entropy(
            logits_of,
            head,
            hidden,
            batch["targets"],
            batch["weights"],
            chunk=chunk,
            stretches=parts(split_axes("seq", hidden.shape[1])),
            z_loss=z_loss,
        )
    return BatchLoss(total=total, sums=sums, sown=sown)


def document_inputs(batch: Batch) -> Batch:
    """What keeps documents apart, where the batch has it."""
    return {name: batch[name] for name in ("positions", "segment_ids") if name in batch}


def make_train_step(
    model: Decoder,
    optimizer_of: OptimizerOf,
    options: StepOptions,
    *,
    convert: Convert | None = None,
    measure: Measure | None = None,
) -> Callable[[TrainState, Batch, StepNumbers], tuple[TrainState, dict[str, Array], Measured | None]]:
    """(state, batch, numbers of the run) -> (state after one step, metrics, measured invariants).

    The batch's arrays are (microbatches, sequences, positions). The gradient is that of
    sum(nll + z_loss * log(Z)^2) / sum(weights) over all microbatches: sums are accumulated and divided once, so
    microbatches with unequal numbers of targets give what one large batch gives.

    With experts, the routers' losses of a microbatch are taken over all its tokens on all devices and weighted by its
    number of targets. The balance loss is no sum over tokens: that of a large batch is not the mean of its
    microbatches', so accumulation changes it.

    Where the loss, the gradient (whichever microbatch it came from) or the update is NaN or infinite, or the loss is a
    spike (anomalies.judge), parameters, moments and balance biases stay bit for bit as they are; the step counts.

    Metrics: loss (nats per target, without any other term), grad_norm (before clipping), learning_rate, z_loss (its
    weighted term) where there is one, those of anomalies.anomaly_metrics, and with experts those of
    router_balance.router_metrics.

    Args:
      optimizer_of: numbers -> the optimizer.
      convert: the state's parameters -> those of `model`, for a model that is trained as another form of itself.
      measure: (the state's parameters, one sequence) -> invariants to return; None: the last result is None.
    """
    objective = _make_objective(model, options, defects=measure is not None and convert is not None)
    section = options.optimizer

    def train_step(state, batch, numbers):
        key = jax.random.fold_in(jax.random.wrap_key_data(numbers.dropout_seed), state.step)
        totals, sown, summed = _gradient(partial(objective, step=state.step), convert, state.params, batch, key)
        # Where no target has a weight, loss and gradient are zero.
        weight = jnp.where(totals.loss.weight > 0, totals.loss.weight, 1)
        with jax.named_scope(OPTIMIZER_SCOPE):
            grads = _divide(summed, weight)
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = optimizer_of(numbers).update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        routers = None if totals.routers is None else _divide(totals.routers, weight)
        if model.config.balance_bias:
            params = router_balance.move_balance_biases(params, present(routers).fraction, section.balance_bias_rate)
        metrics = _loss_metrics(totals.loss, weight, routers, options)
        metrics |= {"grad_norm": grad_norm, "learning_rate": schedule_of(section, numbers)(state.step)}
        with jax.named_scope(OPTIMIZER_SCOPE):
            skip, anomalies = judge(
                state.anomalies,
                metrics["loss"],
                metrics["grad_norm"],
                update_is_finite=all_finite(params),
                sigma=options.skip_spikes_sigma,
            )
            before = state.params, state.opt_state, state.average
            after = params, opt_state, next_average(section, state.average, params, opt_state)
            params, opt_state, average = keep_where(skip, before, after)
        measured = None if measure is None else _measured(measure, state.params, batch, sown)
        state = TrainState(state.step + 1, params, opt_state, anomalies, average)
        return state, metrics | anomaly_metrics(anomalies), measured

    return train_step


def _loss_metrics(
    loss: LossSums, weight: Array, routers: RouterStatistics | None, options: StepOptions
) -> dict[str, Array]:
    """What is reported of the loss and its terms; `weight` is what the sums are divided by."""
    metrics = {"loss": loss.nll / weight}
    if options.z_loss:
        metrics["z_loss"] = options.z_loss * loss.z / weight
    if routers is not None:
        metrics |= router_balance.router_metrics(routers, balance=options.balance_loss, z=options.router_z_loss)
    return metrics


def _make_objective(model: Decoder, options: StepOptions, *, defects: bool) -> Callable[..., Any]:
    """The loss whose gradient is taken, an Objective but for the keyword `step`.

    With `defects` it also gives what blocks sow of their form's invariants.
    """
    routed = model.config.num_experts > 0
    kept = (DEFECT,) if defects else ()
    collect = (*kept, ROUTER) if routed else kept

    def objective(params, microbatch, key, *, step):
        variables = {"params": params}
        total, sums, sown = batch_loss(
            model,
            variables,
            microbatch,
            chunk=options.chunk,
            kernel=options.kernel,
            z_loss=options.z_loss,
            dropout_key=key,
            step=step,
            collect=collect,
        )
        if not routed:
            return total, (Totals(sums, None), sown)
        routers = jax.tree.map(lambda mean: sums.weight.astype(mean.dtype) * mean, router_balance.all_layers(sown))
        total += router_balance.router_loss(routers, balance=options.balance_loss, z=options.router_z_loss)
        return total, (Totals(sums, routers), {name: sown[name] for name in kept})

    return objective


def _measured(measure: Measure, params: Any, batch: Batch, sown: dict[str, Any]) -> Measured:
    """The invariants of the first sequence, and those of all sequences that the model sowed, if it did."""
    measured = measure(params, jax.tree.map(lambda x: x[0, :1], batch))
    if DEFECT in sown:
        return measured.replace(trained=jax.vmap(partial(collected, collection=DEFECT))(sown).max(0))
    return measured


def _divide(sums: Any, weight: Array) -> Any:
    return jax.tree.map(lambda total: total / weight.astype(total.dtype), sums)


def _gradient(
    objective: Objective, convert: Convert | None, params: Any, batch: Batch, key: Array
) -> tuple[Totals, Any, Any]:
    """As _accumulate, of objective(convert(params), ...)."""
    if convert is None:
        return _accumulate(objective, params, batch, key)
    # Converted once, and the gradient pulled back once, however many microbatches there are. The barriers keep XLA from
    # computing either again where it is read (1,024 tokens on a CPU: 1.5 times Pre-LN, with them 1.1).
    converted, pull_back = jax.vjp(convert, params)
    totals, sown, grads = _accumulate(objective, jax.lax.optimization_barrier(converted), batch, key)
    (grads,) = pull_back(jax.lax.optimization_barrier(grads))
    return totals, sown, grads


def _accumulate(objective: Objective, params: Any, batch: Batch, key: Array) -> tuple[Totals, Any, Any]:
    """(sums, what was sown with the microbatches in front, gradient of the summed objective)."""
    value_and_gradient = jax.value_and_grad(objective, has_aux=True)

    def gradient(microbatch, key):
        (_, (totals, sown)), grads = value_and_gradient(params, microbatch, key)
        return totals, sown, grads

    count = batch["tokens"].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        totals, sown, grads = gradient(first, key)
        return totals, jax.tree.map(lambda x: x[None], sown), grads

    def add(carry, numbered):
        number, microbatch = numbered
        totals, sown, grads = gradient(microbatch, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, (totals, grads)), sown

    shapes, _, _ = jax.eval_shape(gradient, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.tree.map(jnp.zeros_like, params)
    (totals, grads), sown = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
    return totals, sown, grads


def make_eval_step(
    model: Decoder, *, chunk: int | None = None, kernel: str = "xla", convert: Convert | None = None
) -> Callable[[Any, Batch, Array | None], LossSums]:
    """(params, batch, step) -> loss sums of that batch, without dropout.

    Args:
      chunk, kernel: as in batch_loss.
      convert: as in make_train_step.
    """

    def eval_step(params, batch, step=None):
        computed = params if convert is None else convert(params)
        return batch_loss(model, {"params": computed}, batch, chunk=chunk, kernel=kernel, step=step).sums

    return eval_step
