"""Pre-LN -> Pre-RMSNorm -> Pre-CRMSNorm without loss (2305.14858): transforms, whole-model conversion, invariants."""

from hybridnorm_jax.equivalence.decoder_forms import (
    Conversion,
    conversion_of,
    decoder_layout,
    to_pre_crmsnorm,
    to_pre_rmsnorm,
)
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
    "recenter",
    "to_pre_crmsnorm",
    "to_pre_rmsnorm",
]
