"""Steps that are not made: NaN or infinity in the loss, the gradient or the update, and sudden rises of the loss."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Anomalies:
    """What is remembered of skipped steps: a part of the training state, so that resuming changes no decision.

    Attributes:
      nonfinite, spikes: steps skipped so far, by reason.
      in_a_row: steps skipped since the last one that was made.
      made: how many steps were made.
      losses: float32, the losses of the last `window` steps that were made; that of step n of these is at n mod window.
    """

    nonfinite: Int[Array, ""]
    spikes: Int[Array, ""]
    in_a_row: Int[Array, ""]
    made: Int[Array, ""]
    losses: Float[Array, "window"]


def no_anomalies(window: int) -> Anomalies:
    """Before the first step."""
    return Anomalies(
        nonfinite=jnp.zeros((), jnp.int32),
        spikes=jnp.zeros((), jnp.int32),
        in_a_row=jnp.zeros((), jnp.int32),
        made=jnp.zeros((), jnp.int32),
        losses=jnp.zeros((window,), jnp.float32),
    )


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number in the arrays of a tree is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def judge(
    before: Anomalies,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    *,
    update_is_finite: Bool[Array, ""],
    sigma: float | None,
) -> tuple[Bool[Array, ""], Anomalies]:
    """(whether to skip this step, what is remembered after it).

    A step is skipped where the loss, the norm of the gradient or a parameter after the update is NaN or infinite, and,
    unless sigma is None, where
        loss > mean(losses) + sigma * std(losses)
    over the last `window` steps that were made (std: divided by the window), as soon as there are so many.
    """
    loss, window = loss.astype(jnp.float32), before.losses.size
    nonfinite = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm) & update_is_finite)
    spike = jnp.zeros((), bool)
    if sigma is not None:
        limit = before.losses.mean() + sigma * before.losses.std()
        spike = (before.made >= window) & ~nonfinite & (loss > limit)
    skip = nonfinite | spike
    after = Anomalies(
        nonfinite=before.nonfinite + nonfinite,
        spikes=before.spikes + spike,
        in_a_row=jnp.where(skip, before.in_a_row + 1, 0),
        made=before.made + ~skip,
        losses=jnp.where(skip, before.losses, before.losses.at[before.made % window].set(loss)),
    )
    return skip, after


def keep_where(skip: Bool[Array, ""], before: Any, after: Any) -> Any:
    """`before` if `skip`, otherwise `after`, leaf by leaf; selected, since 0 * NaN is NaN.

    The count of a learning-rate schedule (optax.ScaleByScheduleState) goes on all the same: the schedule is a function
    of the step, and must end with the run. Adam's own count belongs to its moments, and stays.
    """

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def select(old, new):
        return new if is_schedule(new) else jnp.where(skip, old, new)

    return jax.tree.map(select, before, after, is_leaf=is_schedule)


def anomaly_metrics(anomalies: Anomalies) -> dict[str, Array]:
    """What is reported: steps skipped so far, together and by reason, and since the last step that was made."""
    return {
        "skipped_steps": anomalies.nonfinite + anomalies.spikes,
        "skipped_nonfinite": anomalies.nonfinite,
        "skipped_spikes": anomalies.spikes,
        "skipped_in_a_row": anomalies.in_a_row,
    }
