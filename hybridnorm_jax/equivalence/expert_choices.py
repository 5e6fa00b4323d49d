"""What the routers of a mixture of experts chose, and where two forms of one model can be compared.

The choice of experts is discontinuous. Where the scores of two experts tie up to rounding, two forms that are equal may
choose differently, and what follows differs by more than rounding, with nothing wrong. Such a choice reaches its own
position in the stream after its block, and through attention all later positions of the document in the blocks behind.
There the forms are not compared. Everywhere else they compute a continuous function, and there they are compared.

That excuses a choice only if it is a tie. This is checked for every choice that no earlier one reaches; what earlier
ones have reached may differ at will. A tie is what two equal routers make of rounding, and no more. Let their logits
differ by d at most, relative to their largest absolute value z. Then log softmax differs by 2 d z at most, so the
scores s of both differ by 2 d z p, p the largest probability. If one form chose i where the other chose j, then

    0 <= s_i - s_j <= 4 d z p.

So with d bounded by what rounding explains, a gap (s_i - s_j) / (z p) above TIE = 4 times that bound is an error of the
conversion, however rare. No bound on how many choices differ could say as much: one tie at the first token reaches all
tokens of a sequence, equal tokens tie together, and a wrong choice in a thousand is an error.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.watched_streams import CHOSEN

# What routing_of reads: choices, as MoE sows them, and the results of the modules that is_router names.
ROUTED = [CHOSEN, "intermediates"]
TIE = 4


@flax.struct.dataclass
class Routing:
    """What the routers of all layers made of one batch.

    Attributes:
      logits: as named.
      scores: what the choice is made by: softmax(logits), and the balance bias where the model has one.
      chosen: whether the expert is one of the token's.
    """

    logits: Float[Array, "layers batch seq experts"]
    scores: Float[Array, "layers batch seq experts"]
    chosen: Bool[Array, "layers batch seq experts"]


@flax.struct.dataclass
class RoutingDifference:
    """How the routings of two forms differ on the same tokens.

    Attributes:
      chosen: whether the token's experts differ, in whatever order they were chosen.
      left_out: whether a different choice has reached the stream, after the embedding and after every block.
      routers: per layer, the largest difference of logits over the largest logit, of tokens whose router no different
        choice has reached.
      ties: per layer, of the same tokens where they were sent to different experts, the largest gap between the
        scores of these, in units of the largest logit times the largest probability; 0 where all choices are the same.
    """

    chosen: Bool[Array, "layers batch seq"]
    left_out: Bool[Array, "layers_and_1 batch seq"]
    routers: Float[Array, " layers"]
    ties: Float[Array, " layers"]


def is_router(module: nn.Module, method: str) -> bool:
    """Flax's capture_intermediates: whether the results of this module are wanted."""
    return module.name == "router" and method == "__call__"


def routing_of(config: ModelConfig, params: Any, sown: Any) -> Routing:
    """The routing of Decoder(config).apply(...), which returned the collections ROUTED in `sown`."""
    parts: list[Routing] = []
    for number, run in enumerate(config.runs):
        if not run.has_experts:
            continue
        layer = f"run_{number}"
        (logits,) = sown["intermediates"][layer]["feed_forward"]["router"]["__call__"]
        (experts,) = sown[CHOSEN][layer]["feed_forward"]["value"]
        scores = jax.nn.softmax(logits)
        if config.balance_bias:
            bias = jnp.asarray(params[layer]["feed_forward"]["balance_bias"])
            scores = scores + bias[:, None, None].astype(scores.dtype)
        chosen = (experts[..., None] == jnp.arange(config.num_experts)).any(-2)
        parts.append(Routing(logits=logits, scores=scores, chosen=chosen))
    return jax.tree.map(lambda *layers: jnp.concatenate(layers), *parts)


def compare_routing(
    found: Routing,
    expected: Routing,
    segment_ids: Int[Array, "batch seq"] | None = None,
    *,
    is_causal: bool = True,
) -> RoutingDifference:
    """The differences between the routings of two forms.

    Args:
      found: of one form.
      expected: of the other form, whose scores decide what a tie is.
      segment_ids: as Decoder's; choices do not reach other documents.
      is_causal: a choice does not reach earlier tokens.
    """
    chosen = (found.chosen != expected.chosen).any(-1)
    behind = jnp.cumsum(chosen, axis=0) > 0  # chosen differently in this layer or an earlier one
    none = jnp.zeros_like(chosen[:1])
    reached = _seen(jnp.concatenate([none, behind[:-1]]), segment_ids, is_causal=is_causal)

    largest = jnp.abs(expected.logits).max((1, 2, 3))
    difference = jnp.where(reached[..., None], 0, jnp.abs(found.logits - expected.logits)).max((1, 2, 3))
    ours = jnp.where(expected.chosen & ~found.chosen, expected.scores, -jnp.inf).max(-1)
    theirs = jnp.where(found.chosen & ~expected.chosen, expected.scores, jnp.inf).min(-1)
    gap = jnp.where(chosen & ~reached, ours - theirs, 0).max((1, 2))
    unit = largest * jax.nn.softmax(expected.logits).max((1, 2, 3))
    return RoutingDifference(
        chosen=chosen,
        left_out=jnp.concatenate([none, reached | chosen]),
        routers=difference / jnp.where(largest > 0, largest, 1),
        ties=gap / jnp.where(unit > 0, unit, 1),
    )


def _seen(
    where: Bool[Array, "layers batch seq"], segment_ids: Int[Array, "batch seq"] | None, *, is_causal: bool
) -> Bool[Array, "layers batch seq"]:
    """Whether it holds of a token that this one sees: itself, or an earlier one, or any, of its document."""
    batch, length = where.shape[1:]
    every = jnp.ones((length, length), bool)
    seen = jnp.broadcast_to(jnp.tril(every) if is_causal else every, (batch, length, length))
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.einsum("lbs,bts->lbt", where.astype(jnp.float32), seen.astype(jnp.float32)) > 0
