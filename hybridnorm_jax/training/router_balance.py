"""What a training step does with what the routers of a mixture of experts sow."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from hybridnorm_jax.model.moe import RouterStatistics
from hybridnorm_jax.model.watched_streams import ROUTER

BIAS = "balance_bias"


def all_layers(sown: Mapping[str, Any]) -> RouterStatistics:
    """The statistics of all layers, first to last: every field has the layers in front."""
    runs = sorted(sown[ROUTER].items(), key=lambda item: int(item[0].rpartition("_")[2]))
    layers = [run["feed_forward"]["statistics"][0] for _, run in runs]
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *layers)


def router_loss(routers: RouterStatistics, *, balance: float, z: float) -> Float[Array, ""]:
    """sum over the layers of balance * balance_loss + z * z_loss."""
    return balance * routers.balance_loss.sum() + z * routers.z_loss.sum()


def router_metrics(routers: RouterStatistics, *, balance: float, z: float) -> dict[str, Array]:
    """What is reported of a step: the two weighted losses, and how the tokens fall on the experts.

    balance_loss, router_z_loss: weighted, summed over the layers, as they stand in the training loss.
    router_balance: the balance loss, not weighted, mean over the layers; 1 is balance.
    router_entropy: mean over the layers, in nats.
    largest_load: the fullest expert of all layers, its tokens over the mean of its layer; 1 is balance, num_experts / k
      the worst there can be.
    expert_fraction: (layers, experts), each layer's sum is 1.
    """
    return {
        "balance_loss": balance * routers.balance_loss.sum(),
        "router_z_loss": z * routers.z_loss.sum(),
        "router_balance": routers.balance_loss.mean(),
        "router_entropy": routers.entropy.mean(),
        "largest_load": routers.fraction.max() * routers.fraction.shape[-1],
        "expert_fraction": routers.fraction,
    }


def move_balance_biases(params: Any, fraction: Float[Array, "layers experts"], rate: float) -> Any:
    """bias_e <- bias_e + rate * sign(mean of fraction - fraction_e) in every layer; all other parameters stay.

    An expert that got fewer tokens than the mean becomes more eligible, by the same step whatever it lacks. Auxiliary-
    loss-free balancing (2408.15664), algorithm 1.
    """
    flat = flatten_dict(params)
    biases = sorted((path for path in flat if path[-1] == BIAS), key=lambda path: int(path[0].rpartition("_")[2]))
    first = 0
    for path in biases:
        layers = slice(first, first + len(flat[path]))
        step = rate * jnp.sign(fraction[layers].mean(1, keepdims=True) - fraction[layers])
        flat[path] = flat[path] + step.astype(flat[path].dtype)
        first = layers.stop
    return unflatten_dict(flat)
