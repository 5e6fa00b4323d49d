"""Tokens per second, model FLOPs, and how much of the hardware's peak they use."""

from collections.abc import Sequence

import numpy as np

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.model.config import ModelConfig

# bfloat16 FLOP/s of dense (not sparse) matrix products per JAX device, by jax.Device.device_kind; from the vendors'
# data sheets. A TPU7x chip (2307e12) is two devices; on the other TPUs a device is a chip.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
}


def tokens_per_second(step_seconds: Sequence[float], tokens_per_step: int) -> float | None:
    """tokens_per_step / median(step_seconds): the throughput of training; None where there are no steps.

    The median does not move with a few slow steps. What slows every step down, such as other work on the machine or
    input that comes too late, shows in full.

    Args:
      step_seconds: of the steps that only trained (StepClock), the wait for their batches included.
      tokens_per_step: positions that a step reads, train.batch_size x train.seq_len, on all devices together. Positions
        whose target has weight 0 count too.
    """
    return tokens_per_step / float(np.median(step_seconds)) if len(step_seconds) else None


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device, None where unknown (a CPU, for one)."""
    return PEAK_FLOPS.get(device_kind)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of the matrix products of one training step, forward and backward, per token.

        6 * weights + 12 * num_heads * head_dim * (sum over the layers of the keys that a query sees)

    `weights` counts the parameters that enter a token's matrix products: q, k, v and output projections, the
    feed-forward layer (three matrices where it has a gate, otherwise two) and the head, tied or not; not the embedding
    lookup, norms and biases. Of a mixture of experts these are the router, the token's k experts and the shared ones.
    The second term is attention's scores and their product with the values. With the causal mask a query sees
    seq_len / 2 keys in the mean, within a window of w of them w (1 - w / (2 seq_len)). The backward pass costs twice
    the forward pass. What rematerialization computes again is not counted.
    """
    head_dim, d_model = model.head_dim, model.d_model
    attention = d_model * head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    kernels = 3 if model.is_gated else 2
    feed_forward = 0
    for has_experts in model.has_experts:
        if has_experts:
            width = present(model.experts_per_token) * model.mlp_dim + model.shared_width
            feed_forward += d_model * (kernels * width + model.num_experts + model.shared_expert_gate)
        else:
            feed_forward += d_model * kernels * model.dense_width
    weights = model.num_layers * attention + feed_forward + model.whole_width * model.vocab_size
    seen = sum(_keys_seen(seq_len, window) for window in model.layer_windows)
    return 6 * weights + 12 * model.num_heads * head_dim * seen


def _keys_seen(seq_len: int, window: int) -> float:
    """How many keys a query sees in the mean, causally and within a window; 0: no window."""
    if window == 0 or window >= seq_len:
        return seq_len / 2
    return window * (1 - window / (2 * seq_len))


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilization: FLOP/s of the model / bfloat16 peak of all devices; None where the peak is unknown.

    The peak is bfloat16's whatever the model computes in, and the FLOPs are those of model_flops_per_token: causal
    attention counted by half, no rematerialization (PaLM, 2204.02311, appendix B, counts attention in full).
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)
