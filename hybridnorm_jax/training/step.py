"""One optimizer step and one evaluation step, as pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array

from hybridnorm_jax.decoder import Decoder
from hybridnorm_jax.loss import LossSums, chunked_cross_entropy, cross_entropy
from hybridnorm_jax.training.state import TrainState

Batch = dict[str, Array]  # tokens, targets, weights, and with documents kept apart segment_ids, positions


def loss_sums(
    model: Decoder, params: Any, batch: Batch, chunk: int | None, dropout_key: Array | None = None
) -> LossSums:
    """The loss of one batch (sequences x positions), as sums.

    Args:
      chunk: positions whose logits are held at a time; None: all.
      dropout_key: None switches dropout off.
    """
    inputs = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
    if dropout_key is not None and model.config.dropout > 0:
        inputs |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    variables = {"params": params}
    if chunk is None:
        return cross_entropy(model.apply(variables, batch["tokens"], **inputs), batch["targets"], batch["weights"])
    if "kernel" in params.get("head", {}):
        # Gathered once, and its gradient reduced once, instead of in every chunk.
        kernel = nn.with_logical_constraint(params["head"]["kernel"], (None, "vocab"))
        variables = {"params": params | {"head": params["head"] | {"kernel": kernel}}}
    hidden = model.apply(variables, batch["tokens"], method="hidden", **inputs)
    return chunked_cross_entropy(
        lambda piece: model.apply(variables, piece, method="logits"), hidden, batch["targets"], batch["weights"], chunk
    )


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state after one update, metrics); the batch's arrays are (microbatches, sequences, positions).

    The gradient is that of sum(nll + z_loss * log(Z)^2) / sum(weights) over all microbatches: sums are accumulated
    and divided once, so microbatches with unequal numbers of targets give what one large batch gives.

    Metrics: loss (nats per target, without the z-loss), grad_norm (before clipping), learning_rate, and z_loss (its
    weighted term) where there is one.
    """
    dropout_root = jax.random.key(seed)

    def objective(params, microbatch, key):
        sums = loss_sums(model, params, microbatch, chunk, key)
        return sums.nll + z_loss * sums.z, sums

    gradient = jax.value_and_grad(objective, has_aux=True)

    def accumulate(params, batch, key):
        count = batch["tokens"].shape[0]
        if count == 1:
            (_, sums), grads = gradient(params, jax.tree.map(lambda x: x[0], batch), key)
            return sums, grads

        def body(carry, piece):
            number, microbatch = piece
            (_, sums), grads = gradient(params, microbatch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        zeros = (
            LossSums.zero(jnp.promote_types(model.config.dtype, jnp.float32)),
            jax.tree.map(jnp.zeros_like, params),
        )
        (sums, grads), _ = jax.lax.scan(body, zeros, (jnp.arange(count), batch))
        return sums, grads

    def train_step(state, batch):
        sums, grads = accumulate(state.params, batch, jax.random.fold_in(dropout_root, state.step))
        weight = jnp.where(sums.weight > 0, sums.weight, 1)  # no target at all: loss and gradient are zero
        grads = jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": sums.nll / weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        if z_loss:
            metrics["z_loss"] = z_loss * sums.z / weight
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return train_step


def make_eval_step(model: Decoder, *, chunk: int | None = None) -> Callable[[Any, Batch], LossSums]:
    """(params, batch) -> loss sums of that batch, without dropout."""
    return lambda params, batch: loss_sums(model, params, batch, chunk)
