"""FLOPs of kernels and library calls, of which the compiled text shows the operands alone, by formula."""

import math
import re
from collections.abc import Callable

from hybridnorm_jax.planning.gpu_kernel_products import gpu_kernel_flops
from hybridnorm_jax.planning.hlo_text import Array, Computation, Instruction, arrays

# What XLA writes as a custom call and what multiplies no matrices.
_WITHOUT_PRODUCTS = re.compile(
    r"AllocateBuffer|AssumeGatherIndicesInBound|AsyncCollective(Start|Done)|ConcatBitcast|GatherScatterIndicesBitpacked"
    r"|Sharding|SPMD\w*|TopK|ApproxTopK|PartialReduce|SliceToDynamic|PadToStatic|DynamicGteTuple|X64\w*|MoveTo(Host|Device)"
    r"|ResizeNearest\w*|LayoutConstraint|AnnotateDevicePlacement|annotate_device_placement|Pin|Unpin|CreateBuffer"
    r"|__cub\$\w+|cu_threefry2x32\w*|tpu_memory_\w+|xla_ffi_\w*partition_id|.*callback\w*|BarrierStart|BarrierDone"
)
# The kernels of kernels/tpu_fused.py, whose names JAX's transformations put into others.
_FUSED_EXPERTS = re.compile(r"experts_(hidden|outputs|d_hidden|d_rows|d_input_kernels|d_output_kernels)")
# Products of one sequence with another in each kernel of splash attention: forward the scores and their sum of values;
# backward each recomputes the scores and their gradient.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_FUSED_SPLASH_BACKWARD = 5
# The same of our own kernels, in each block of a causal mask.
_CAUSAL_ATTENTION = {"causal_attention_forward": 2, "causal_attention_backward": 5}


def kernel_flops(call: Instruction, computation: Computation) -> int | None:
    """FLOPs of one run of a custom call: 0 for what multiplies nothing, None for what is not known.

    Splash attention counts the blocks of a causal mask that it visits, cuDNN's attention half of all pairs where it is
    causal. Products of experts (gmm, and our own) count every row that they are given; of rows of nobody they do less.
    Kernels of this package for GPUs: see gpu_kernel_products.py.
    """
    operands = [array for name in call.operand_names for array in arrays(computation[name].shape)]
    results = arrays(call.shape)
    kernel = re.sub(r"(\.\w+)+$", "", call.name)
    own = next((name for name in _CAUSAL_ATTENTION if name in kernel), None)
    match call.target:
        case "tpu_custom_call" if own is not None:
            return _causal_attention(own, call, operands)
        case "tpu_custom_call" if "head_forward" in kernel or "head_backward" in kernel:
            return _head(operands, results, products=1 if "head_forward" in kernel else 2)
        case "tpu_custom_call" if kernel.startswith("splash_m"):
            return _splash(kernel, call, operands)
        case "tpu_custom_call" if kernel in ("gmm", "tgmm"):
            return _grouped(operands, results)
        case "tpu_custom_call" if _FUSED_EXPERTS.search(kernel):
            return _fused_experts(operands, results)
        case target if target.startswith("__cudnn$fmha"):
            return _cudnn_attention(call, operands)
        case target if target.startswith("__cublas$"):
            return _gemm(call, operands, results)
        case target if "triton" in target:
            return gpu_kernel_flops(call, operands, results)
        case target if _WITHOUT_PRODUCTS.fullmatch(target):
            return 0
    return None


def _splash(kernel: str, call: Instruction, operands: list[Array]) -> int | None:
    step = next((each for each in _SPLASH if f"_{each}" in kernel), None)
    queries, keys, *_ = [each for each in operands if len(each.sizes) >= 3 and each.dtype != "s8"]
    block = _splash_block(call, "" if step == "fwd" else f"_{step}")
    if step is None or block is None:
        return None
    products = _SPLASH[step]
    if step == "dkv" and re.search(r'"use_fused_bwd_kernel\\?": true', call.attributes):
        products = _FUSED_SPLASH_BACKWARD
    rows, columns = queries.sizes[-2], keys.sizes[-2]
    pairs = rows * columns // 2  # stretches of a split sequence: balanced, so half of all
    if rows == columns:
        seen = sum(
            min(-(-(start + block.rows) // block.columns) * block.columns, columns) for start in _starts(rows, block)
        )
        pairs = seen * block.rows
    return 2 * products * math.prod(queries.sizes) // rows * pairs


def _causal_attention(kernel: str, call: Instruction, operands: list[Array]) -> int | None:
    """Of heads (batch, heads, head_dim, seq): every block of queries with the blocks of keys that it sees."""
    block = _splash_block(call, "")
    if block is None:
        return None
    query = operands[0].sizes
    blocks = query[-1] // block.rows
    return 2 * _CAUSAL_ATTENTION[kernel] * math.prod(query[:-1]) * block.rows**2 * blocks * (blocks + 1) // 2


def _head(operands: list[Array], results: list[Array], *, products: int) -> int:
    """Of the head's kernels (kernels/tpu_head.py): every token with the whole table, which is their second operand."""
    logits = next(each for each in (*operands, *results) if len(each.sizes) == 3 and each.sizes[0] == 1)
    return 2 * products * logits.sizes[-1] * math.prod(operands[1].sizes)


class _Block:
    """The rows and columns of one block of splash attention's scores."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns


def _starts(rows: int, block: _Block) -> range:
    return range(0, rows, block.rows)


def _splash_block(call: Instruction, ending: str) -> _Block | None:
    sides = [re.search(rf'"block_{side}{ending}\\?": (\d+)', call.attributes) for side in ("q", "kv")]
    if None in sides:
        return None
    rows, columns = (int(side[1]) for side in sides if side)
    return _Block(rows, columns)


def _grouped(operands: list[Array], results: list[Array]) -> int:
    """2 * rows * k * n of gmm (rows, k) x (groups, k, n), and of tgmm (rows, k)^T x (rows, n) for each group."""
    left, _right = [each for each in operands if len(each.sizes) >= 2 and each.dtype not in ("s32", "u32")][-2:]
    return 2 * math.prod(left.sizes) * results[0].sizes[-1]


def _fused_experts(operands: list[Array], results: list[Array]) -> int:
    """2 * rows * k * n for every (groups, k, n) that they read, kernels, or write, gradients of kernels."""
    rows = next(each.sizes[0] for each in operands if len(each.sizes) == 2)
    stacks = [each for each in (*operands, *results) if len(each.sizes) == 3 and math.prod(each.sizes) != rows]
    return sum(2 * rows * each.sizes[1] * each.sizes[2] for each in stacks)


def _cudnn_attention(call: Instruction, operands: list[Array]) -> int | None:
    scores = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]', call.attributes)
    mask = re.search(r'"mask_type":\s*"(\w+)"', call.attributes)
    if not scores or not mask:
        return None
    pairs = math.prod(int(side) for side in re.findall(r"\d+", scores[1]))
    products = 5 if call.target.endswith("Backward") else 2
    full = 2 * products * pairs * operands[0].sizes[-1]
    return full // 2 if "CAUSAL" in mask[1] else full


def _gemm(call: Instruction, operands: list[Array], results: list[Array]) -> int | None:
    contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', call.attributes)
    if not contracted:
        return None
    sides = [operands[0].sizes[int(dim)] for dim in re.findall(r"\d+", contracted[1])]
    return 2 * math.prod(results[0].sizes) * math.prod(sides)


KernelFlops = Callable[[Instruction, Computation], int | None]
