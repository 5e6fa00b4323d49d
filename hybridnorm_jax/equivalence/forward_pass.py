"""A forward pass of a model that also returns the stream and the routers' choices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.equivalence.expert_choices import ROUTED, Routing, is_router, routing_of
from hybridnorm_jax.model.build import build_model
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder import EncoderOutput
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.model.watched_streams import STREAM


@flax.struct.dataclass
class ForwardPass:
    """What a forward pass gives.

    Attributes:
      output: logits (batch, seq, vocab); of an Encoder what `compared` names, in one row (batch, 1, numbers).
      stream: after the embedding and after every block.
      routing: None for a model without experts.
    """

    output: Float[Array, "batch seq vocab"]
    stream: Float[Array, "layers_and_1 batch seq embed"]
    routing: Routing | None


def forward(config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs: Any) -> ForwardPass:
    """The forward pass of build_model(config) in config.dtype, without dropout unless `inputs` ask for it.

    Args:
      tokens: what the model reads; of an Encoder perhaps pixels (batch, height, width, channels).
      inputs: further arguments of the model and of its `apply`, such as segment_ids, or deterministic=False and rngs.
    """
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none")
    collections = [STREAM]
    if config.num_experts:
        collections += ROUTED
        inputs |= {"capture_intermediates": is_router}
    # By default TPUs and GPUs take float32 products in fewer bits, which would be compared here.
    with jax.default_matmul_precision("highest"):
        output, sown = build_model(plain).apply({"params": params}, tokens, mutable=collections, **inputs)
    return ForwardPass(
        output=_one_row(config, output) if isinstance(config, EncoderConfig) else output,
        stream=collected(sown, STREAM),
        routing=routing_of(config, params, sown) if config.num_experts else None,
    )


def compared(config: ModelConfig) -> str:
    """What `output` of a ForwardPass is, in words: all that a model gives and that its conversion leaves as it is."""
    if not isinstance(config, EncoderConfig) or config.num_classes is not None:
        return "logits"
    if config.norm_pooled_only:  # the last hidden state is the stream, which loses its mean
        return "what is pooled"
    return "last hidden state" if config.pooling == "none" else "last hidden state and what is pooled"


def _one_row(config: EncoderConfig, output: Array | EncoderOutput) -> Float[Array, "batch 1 numbers"]:
    """All numbers that are compared of an image, or of a sequence, side by side."""
    if not isinstance(output, EncoderOutput):
        return output[:, None]
    hidden = None if config.norm_pooled_only else output.last_hidden_state.reshape(len(output.last_hidden_state), -1)
    parts = [part for part in (hidden, output.pooled) if part is not None]
    return jnp.concatenate(parts, axis=-1)[:, None]


def collected(sown: Mapping[str, Any], collection: str) -> Array:
    """What blocks and decoder have sown into a collection: first after the embedding, then after every block."""
    values = dict(sown[collection])
    (embedded,) = values.pop("value")
    parts = [embedded[None]]
    for name in sorted(values, key=_run_number):
        (layers,) = values[name]["value"]
        parts.append(layers)
    return jnp.concatenate(parts)


def _run_number(name: str) -> int:
    """The i of run_<i>."""
    return int(name.rpartition("_")[2])
