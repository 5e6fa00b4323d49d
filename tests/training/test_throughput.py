"""FLOPs agree with counts made by hand and with the real parameters."""

import math

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token, peak_flops

TINY = {"d_model": 8, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16, "vocab_size": 10}


def test_flops_counted_by_hand():
    # A layer: q 8*8, k and v 8*4 each, out 8*8, three matrices of 8*16: 64 + 32 + 32 + 64 + 384 = 576. Head: 8*10.
    # Attention: forward 2 (scores) + 2 (values) products of 2*4*6 multiply-adds' FLOPs, 3 of forward and backward,
    # half of it masked: 3 layers * 12 * 8 * 6 / 2 = 864.
    swiglu = hn.ModelConfig(**TINY, activation="swiglu")
    assert model_flops_per_token(swiglu, seq_len=6) == 6 * (3 * 576 + 80) + 864 == 11712
    gelu = hn.ModelConfig(**TINY, activation="gelu")
    assert model_flops_per_token(gelu, seq_len=6) == 6 * (3 * (576 - 128) + 80) + 864


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_follow_the_decoders_own_matrices(activation):
    config = hn.ModelConfig(**TINY, activation=activation, attention_bias=True, mlp_bias=True, head_dim=6)
    shapes = jax.eval_shape(hn.Decoder(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    weights = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    assert model_flops_per_token(config, seq_len=0) == 6 * weights


def test_a_window_costs_the_keys_that_it_shows():
    # One of three layers sees 2 of 6 tokens: 2 * 6 - 2 * 2 / 2 = 10 pairs instead of 6 * 6 / 2 = 18.
    flops = {w: model_flops_per_token(hn.ModelConfig(**TINY, windows=w), 6) for w in ((0, 2, 0), (0, 6, 7), ())}
    assert flops[()] - flops[0, 2, 0] == pytest.approx(12 * 8 * (18 - 10) / 6)
    assert flops[0, 6, 7] == flops[()]


def test_a_tied_head_costs_as_much():
    flops = {tied: model_flops_per_token(hn.ModelConfig(**TINY, tie_embeddings=tied), 6) for tied in (False, True)}
    assert flops[True] == flops[False]


def test_mfu_of_known_and_unknown_devices():
    # 1e6 tokens/s of 1e9 FLOPs = 1e15 FLOP/s on two H100s of 989e12.
    assert mfu(1e6, 1e9, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(1e15 / 1978e12)
    assert mfu(1e6, 1e9, "cpu", 8) is None
    assert mfu(1e6, 1e9, jax.devices("cpu")[0].device_kind, 8) is None


def test_device_kinds_are_matched_whole():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") is None
