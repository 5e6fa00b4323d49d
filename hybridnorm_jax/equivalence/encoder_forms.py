"""Our own Encoder in its three forms. Its blocks are converted like a Decoder's; what stands around them is not.

Embedding, final norm, pooling and head keep their parameters and see whole vectors in every form. What writes the
stream before the first block is centred. Where a norm follows the embedding, its result has a mean again, which the
converted model subtracts: the one centring of a stream that stays.
"""

import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict

from hybridnorm_jax.equivalence.decoder_forms import (
    Conversion,
    check_pre_layernorm,
    checked,
    compressed,
    run_rules,
)
from hybridnorm_jax.equivalence.layout import ResidualLayout, Role, Untouched, Writes
from hybridnorm_jax.equivalence.model_params import check_params
from hybridnorm_jax.equivalence.plain_models import roomy_params, with_roomy_blocks, without_stream_norms
from hybridnorm_jax.equivalence.transforms import fold_affine, recenter
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.encoder_config import EncoderConfig

# The first part of the path of every leaf that is added to the stream before the first block.
ENTRANCES = (
    "patch_embedding",
    "token_embedding",
    "class_token",
    "distillation_token",
    "register_tokens",
    "mask_token",
    "position_embedding",
)
EMBEDDING_CENTRING = "the stream behind the norm after the embedding (model.embedding_centring)"
POOLING_CENTRING = "the norm in attention pooling stays LayerNorm (model.pooling_norm)"


def encoder_conversion(config: EncoderConfig, form: str, *, pad_to: int = 1) -> Conversion:
    """forms.conversion_of for an Encoder.

    The last hidden state of a model whose final norm is applied to what is pooled alone (norm_pooled_only) is the
    stream, whose mean the conversion takes away; all other outputs stay.
    """
    check_pre_layernorm(config)
    has_pooling_norm = config.pooling == "attention"
    roomy, changes = with_roomy_blocks(config)
    plain = dataclasses.replace(
        without_stream_norms(roomy),
        pooling_norm=(config.pooling_norm or "layernorm") if has_pooling_norm else None,
        embedding_centring=config.embedding_centring or config.has_embedding_norm,
    )
    remaining = {
        EMBEDDING_CENTRING: plain.embedding_centring,
        POOLING_CENTRING: plain.pooling_norm == "layernorm",
    }
    before, after = encoder_layout(roomy), encoder_layout(plain)

    def convert(params: Any) -> dict[str, Any]:
        check_params(config, params)
        folded = fold_affine(roomy_params(config, roomy, params), before)
        return checked(plain, recenter(folded, after))

    conversion = Conversion(
        config=plain,
        convert=convert,
        layout=after,
        centrings=tuple(name for name, remains in remaining.items() if remains),
        changes=changes,
    )
    if form == "pre_rmsnorm":
        return conversion
    return compressed(conversion, encoder_layout, pad_to=pad_to, whole_outside=True)


def encoder_layout(config: EncoderConfig) -> ResidualLayout:
    """The residual layout of Encoder(config), Pre-Norm; with whole_outside only the blocks' leaves touch the stream."""
    rules: dict[str, Role] = {}
    for path in flatten_dict(abstract_params(config), sep="/"):
        first = path.partition("/")[0]
        if not first.startswith("run_"):
            is_entrance = first in ENTRANCES and not config.whole_outside
            rules[path] = Writes() if is_entrance else Untouched()
    for number, run in enumerate(config.runs):
        rules |= run_rules(config, run, f"run_{number}")
    return ResidualLayout(rules)
