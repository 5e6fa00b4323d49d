"""Our own Encoder in its three forms. Its blocks are converted like a Decoder's; what stands around them is not.

Embedding, final norm, pooling and head keep their parameters and see whole vectors in every form. What writes the
stream before the first block is centred. Where a norm follows the embedding, its result has a mean again, which the
converted model subtracts: the one centring of a stream that stays.
"""

import dataclasses
from typing import Any

from hybridnorm_jax.equivalence.decoder_forms import (
    EMBEDDING_CENTRING,
    Conversion,
    check_pre_layernorm,
    checked,
    compressed,
    layout_of_blocks,
)
from hybridnorm_jax.equivalence.model_params import check_params
from hybridnorm_jax.equivalence.plain_models import roomy_params, with_roomy_blocks, without_stream_norms
from hybridnorm_jax.equivalence.transforms import fold_affine, recenter
from hybridnorm_jax.model.encoder_config import EncoderConfig

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
        without_stream_norms(roomy, keeps_outer=True),
        pooling_norm=(config.pooling_norm or "layernorm") if has_pooling_norm else None,
        embedding_centring=config.has_embedding_norm,
    )
    remaining = {
        EMBEDDING_CENTRING: plain.embedding_centring,
        POOLING_CENTRING: plain.pooling_norm == "layernorm",
    }
    before, after = layout_of_blocks(roomy), layout_of_blocks(plain)

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
    return compressed(conversion, layout_of_blocks, pad_to=pad_to, whole_outside=True)
