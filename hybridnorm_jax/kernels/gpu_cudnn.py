"""Causal attention by cuDNN's fused kernels, on NVIDIA GPUs."""

import jax

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads


def cudnn_attention(inputs: AttentionInputs) -> Heads:
    """attention_backends.causal_attention, without segment ids: JAX gives this kernel none.

    What it can do otherwise (dtypes, sizes of a head) is in attention_backends.py, and asked there.
    """
    return jax.nn.dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True, implementation="cudnn")
