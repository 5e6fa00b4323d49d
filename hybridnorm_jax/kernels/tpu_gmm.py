"""The grouped product of the kernel in jax.experimental.pallas.ops.tpu.megablox, on a TPU."""

from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.expert_rows import GroupSizes, Rows, pad_rows
from hybridnorm_jax.kernels.swiglu import InputKernels

LANES = 128


def gmm_product(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> Float[Array, "rows mlp"]:
    """rows_i kernels[e] in the dtype of rows, which the kernel sums in float32."""
    # Not measured on a TPU. A tile of rows that two groups share is computed for each, so tiles are short against the
    # mean group; along embed and mlp they are the largest that fit into a v5e core's memory.
    experts, embed, mlp = kernels.shape
    tile_rows = next((size for size in (512, 256) if 4 * size * experts <= len(rows)), LANES)
    largest = 1024 if rows.dtype.itemsize == 2 else 512
    tile_channels = min(largest, _whole_lanes(embed), _whole_lanes(mlp))
    padded = pad_rows(rows, -len(rows) % tile_rows)
    tiling = (tile_rows, tile_channels, tile_channels)
    return gmm(padded, kernels, sizes, preferred_element_type=rows.dtype, tiling=tiling)[: len(rows)]


def _whole_lanes(size: int) -> int:
    """The multiple of LANES that holds `size`."""
    return LANES * -(-size // LANES)
