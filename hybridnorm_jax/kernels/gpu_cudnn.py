"""Attention by cuDNN's fused kernels, on NVIDIA GPUs."""

import jax

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads


def cudnn_attention(inputs: AttentionInputs, *, scale: float, causal: bool) -> Heads:
    """attention_backends.softmax_attention, without segment ids: JAX gives this kernel none.

    What it can do otherwise (dtypes, sizes of a head) is in attention_backends.py, and asked there.
    """
    return jax.nn.dot_product_attention(
        inputs.query, inputs.key, inputs.value, scale=scale, is_causal=causal, implementation="cudnn"
    )
