"""FLOPs of this package's own kernels for GPUs, by formula."""

import math
import re

from hybridnorm_jax.kernels.flash_tiles import attention_tiles, visited_pairs
from hybridnorm_jax.planning.hlo_text import Array, Instruction

# Products of one sequence with another in each kernel of flash attention: forward the scores and their sum of values;
# backward each computes the scores and their gradient again.
_FLASH = {"flash_forward": 2, "flash_d_query": 3, "flash_d_key_value": 4}


def gpu_kernel_flops(call: Instruction, operands: list[Array], results: list[Array]) -> int | None:
    """FLOPs of one run of a Pallas kernel on a GPU; None for what is not known.

    Flash attention counts the tiles of a causal mask that it visits where there are no segments; where there are, it
    visits fewer. The experts count every row that they are given.
    """
    name = re.search(r'\bname = "(\w+)"', call.attributes)
    match name[1] if name else "":
        case kernel if kernel in _FLASH:
            return _flash(kernel, operands)
        case "experts_hidden" | "experts_d_hidden" | "experts_outputs" | "experts_d_rows":
            kernels = [each for each in operands if len(each.sizes) == 3]
            rows = next(each for each in operands if len(each.sizes) == 2)
            return sum(2 * rows.sizes[0] * each.sizes[1] * each.sizes[2] for each in kernels)
        case "experts_d_input_kernels" | "experts_d_output_kernels":
            rows = next(each for each in operands if len(each.sizes) == 2)
            return sum(2 * rows.sizes[0] * each.sizes[1] * each.sizes[2] for each in results)
    return None


def _flash(kernel: str, operands: list[Array]) -> int:
    query, key, *_ = [each for each in operands if len(each.sizes) == 4]
    batch, queries, heads, head_dim = query.sizes
    keys = key.sizes[1]
    tiles = attention_tiles(min(queries, keys), head_dim, query.bytes // math.prod(query.sizes))
    of_kernel = {"flash_forward": tiles.forward, "flash_d_query": tiles.d_query, "flash_d_key_value": tiles.d_key_value}
    pairs = visited_pairs(queries, keys, of_kernel[kernel])
    return 2 * _FLASH[kernel] * batch * heads * head_dim * pairs
