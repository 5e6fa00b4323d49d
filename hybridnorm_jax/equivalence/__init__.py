"""Pre-LN -> Pre-RMSNorm -> Pre-CRMSNorm without loss (2305.14858).

The transforms as pure functions on any parameter tree that a residual layout describes, the conversion of a whole
Decoder, what must hold of a converted model, and the proof that it does. Reading and writing checkpoints is in interop
and training; the norms themselves are in model.
"""

from hybridnorm_jax.equivalence.decoder_forms import Conversion, decoder_layout, layout_of_blocks
from hybridnorm_jax.equivalence.forms import conversion_of, to_pre_crmsnorm, to_pre_rmsnorm
from hybridnorm_jax.equivalence.layout import (
    LayoutError,
    NormBias,
    NormScale,
    Reads,
    ResidualLayout,
    Untouched,
    Writes,
)
from hybridnorm_jax.equivalence.transforms import compress, decompress, fold_affine, recenter

__all__ = [
    "Conversion",
    "LayoutError",
    "NormBias",
    "NormScale",
    "Reads",
    "ResidualLayout",
    "Untouched",
    "Writes",
    "compress",
    "conversion_of",
    "decoder_layout",
    "decompress",
    "fold_affine",
    "layout_of_blocks",
    "recenter",
    "to_pre_crmsnorm",
    "to_pre_rmsnorm",
]
