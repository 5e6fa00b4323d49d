"""FLOPs counted in compiled programs: exactly what their shapes and loops say, kernels by their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.planning.matrix_products import matrix_products, total_flops


def compiled(function, *shapes):
    """XLA's text of a function of arrays of these shapes, compiled for this machine."""
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).compile().as_text()


def test_a_scan_of_products_counts_each():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    assert total_flops(matrix_products(compiled(scanned, (32, 48), (48, 48)))) == 7 * 2 * 32 * 48 * 48


def test_the_gradient_of_a_scan_in_a_scan_counts_each():
    def loss(w, x):
        def layers(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0], None

        return jax.lax.scan(layers, x, length=5)[0].sum()

    text = compiled(jax.grad(loss), (48, 48), (32, 48))
    # Forward once, backward the gradients of both factors; that of the first x is not needed but computed in its loop.
    assert total_flops(matrix_products(text)) == 15 * 3 * 2 * 32 * 48 * 48


def test_batches_of_products_count_all():
    text = compiled(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), (2, 3, 32, 16), (2, 3, 64, 16))
    assert total_flops(matrix_products(text)) == 2 * (2 * 3 * 32 * 64) * 16


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2,), "padding": [(3, 1)]},
        {"window_strides": (1,), "padding": [(0, 0)], "rhs_dilation": (3,)},
        {"window_strides": (3,), "padding": [(4, 2)], "lhs_dilation": (2,)},
        {"window_strides": (1,), "padding": [(15, 15)]},  # as a TPU writes a batch of products: mostly padding
        {"window_strides": (1,), "padding": [(1, 1)], "feature_group_count": 2},
        {"window_strides": (1,), "padding": [(1, 1)], "batch_group_count": 2},
    ],
    ids=str,
)
def test_a_convolution_counts_what_meets_its_input(options):
    """A convolution of ones counts its own multiplications."""
    features = 4 // options.get("feature_group_count", 1)
    x, w = np.ones((2, 4, 16), np.float32), np.ones((6, features, 5), np.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NCH", "OIH", "NCH"), **options)

    lowered = jax.jit(convolve).lower(x, w)
    text = lowered.compiler_ir("hlo").get_hlo_module().to_string()
    assert total_flops(matrix_products(text)) == 2 * int(convolve(x, w).sum())


SPLASH = """HloModule m

ENTRY %main (q: bf16[2,4,1024,64], k: bf16[2,2,1024,64], m: s8[1,4,4]) -> bf16[2,4,1024,64] {
  %q = bf16[2,4,1024,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,1024,64]{3,2,1,0} parameter(1)
  %m = s8[1,4,4]{2,1,0} parameter(2)
  ROOT %KERNEL.5 = bf16[2,4,1024,64]{3,2,1,0} custom-call(%m, %m, %q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 512, \\"block_q_dkv\\": 256, \\"block_kv_dkv\\": 256, \
\\"block_q_dq\\": 256, \\"block_kv_dq\\": 256, \\"use_fused_bwd_kernel\\": false}"
}}
}
"""


@pytest.mark.parametrize(
    ("kernel", "products", "pairs"),
    [
        ("splash_mha_fwd_residuals", 2, 256 * (512 + 512 + 1024 + 1024)),  # rows of blocks see whole blocks
        ("splash_mha_dq_no_residuals", 3, 256 * (256 + 512 + 768 + 1024)),
        ("splash_mha_dkv_no_residuals", 4, 256 * (256 + 512 + 768 + 1024)),
    ],
)
def test_splash_attention_counts_the_blocks_that_it_visits(kernel, products, pairs):
    (found,) = matrix_products(SPLASH.replace("KERNEL", kernel))
    assert (found.flops, found.is_kernel) == (2 * products * 2 * 4 * 64 * pairs, True)


CAUSAL_ATTENTION = """HloModule m

ENTRY %main (q: bf16[2,4,64,1024], k: bf16[2,2,64,1024]) -> bf16[2,4,64,1024] {
  %q = bf16[2,4,64,1024]{3,2,1,0} parameter(0)
  %k = bf16[2,2,64,1024]{3,2,1,0} parameter(1)
  ROOT %jvp_KERNEL_.5 = bf16[2,4,64,1024]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 256}"
}}
}
"""


@pytest.mark.parametrize(("kernel", "products"), [("causal_attention_forward", 2), ("causal_attention_backward", 5)])
def test_our_own_attention_counts_the_blocks_that_it_visits(kernel, products):
    (found,) = matrix_products(CAUSAL_ATTENTION.replace("KERNEL", kernel))
    assert (found.flops, found.is_kernel) == (2 * products * 2 * 4 * 64 * 256 * 256 * (1 + 2 + 3 + 4), True)


GROUPED = """HloModule m

ENTRY %main (x: bf16[512,64], w: bf16[8,64,96], g: s32[8]) -> bf16[512,96] {
  %x = bf16[512,64]{1,0} parameter(0)
  %w = bf16[8,64,96]{2,1,0} parameter(1)
  %g = s32[8]{0} parameter(2)
  ROOT %gmm.1 = bf16[512,96]{1,0} custom-call(%g, %x, %w), custom_call_target="tpu_custom_call"
}
"""


def test_grouped_products_count_every_row_once():
    assert total_flops(matrix_products(GROUPED)) == 2 * 512 * 64 * 96
    transposed = GROUPED.replace("%w = bf16[8,64,96]{2,1,0}", "%w = bf16[512,96]{1,0}").replace(
        "ROOT %gmm.1 = bf16[512,96]{1,0}", "ROOT %tgmm.1 = bf16[8,64,96]{2,1,0}"
    )
    assert total_flops(matrix_products(transposed)) == 2 * 512 * 64 * 96


FUSED = """HloModule m

ENTRY %main (n: s32[6], x: bf16[512,128], w: f32[1,4,128], g: bf16[8,128,256]) -> bf16[512,256] {
  %n = s32[6]{0} parameter(0)
  %x = bf16[512,128]{1,0} parameter(1)
  %w = f32[1,4,128]{2,1,0} parameter(2)
  %g = bf16[8,128,256]{2,1,0} parameter(3)
  ROOT %jvp_experts_hidden_.1 = bf16[512,256]{1,0} custom-call(%n, %n, %n, %n, %x, %w, %g, %g), \
custom_call_target="tpu_custom_call"
}
"""


def test_fused_experts_count_a_product_for_each_kernel_and_each_gradient_of_one():
    assert total_flops(matrix_products(FUSED)) == 2 * 2 * 512 * 128 * 256
    gradient = FUSED.replace("%n, %x, %w, %g, %g", "%n, %x, %x").replace(
        "ROOT %jvp_experts_hidden_.1 = bf16[512,256]{1,0}",
        "ROOT %experts_d_input_kernels.1 = (bf16[8,128,128]{2,1,0}, bf16[8,128,128]{2,1,0})",
    )
    assert total_flops(matrix_products(gradient)) == 2 * 2 * 512 * 128 * 128


HEAD = """HloModule m

ENTRY %main (h: bf16[256,128], w: bf16[300,256], t: s32[1,128]) -> f32[1,300,128] {
  %h = bf16[256,128]{1,0} parameter(0)
  %w = bf16[300,256]{1,0} parameter(1)
  %t = s32[1,128]{1,0} parameter(2)
  %f = (f32[1,300,128]{2,1,0}, f32[1,128]{1,0}, f32[1,128]{1,0}) custom-call(%h, %w, %t), \
custom_call_target="tpu_custom_call"
  %z = f32[1,300,128]{2,1,0} get-tuple-element(%f), index=0
  %x = bf16[128,256]{1,0} reshape(%h)
  %jvp_head_backward_.1 = (f32[256,128]{1,0}, f32[1,300,256]{2,1,0}) custom-call(%x, %w, %z, %t, %t, %t, %t), \
custom_call_target="tpu_custom_call"
}
""".replace("%f", "%head_forward.2")


def test_the_kernels_of_the_head_count_the_product_and_its_two_gradients():
    forward, backward = matrix_products(HEAD)
    assert (forward.flops, backward.flops) == (2 * 128 * 300 * 256, 2 * 2 * 128 * 300 * 256)


def test_a_kernel_that_nobody_knows_is_named_and_not_counted():
    (found,) = matrix_products(GROUPED.replace("%gmm.1", "%mine.1"))
    assert (found.name, found.flops, found.times) == ("mine.1", None, 1)


CUDNN = """HloModule m

ENTRY %main (q: bf16[2,1024,4,64]) -> bf16[2,4,1024,64] {
  %q = bf16[2,1024,4,64]{3,2,1,0} parameter(0)
  ROOT %a = bf16[2,4,1024,64]{3,1,2,0} custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", \
"dimensions": ["2", "4", "1024", "1024"]}, "mask_type": "CAUSAL"}}
}
"""


def test_cudnn_attention_counts_half_of_all_pairs_where_it_is_causal():
    half = 2 * 4 * 1024 * 1024 * 64 // 2
    assert total_flops(matrix_products(CUDNN)) == 2 * 2 * half
    assert total_flops(matrix_products(CUDNN.replace("CAUSAL", "NO_MASK"))) == 2 * 2 * 2 * half
    assert total_flops(matrix_products(CUDNN.replace("fmhaSoftmax", "fmhaSoftmaxBackward"))) == 5 * 2 * half


def test_cublas_counts_what_it_contracts():
    text = """HloModule m

ENTRY %main (x: f32[32,48], w: f32[48,16]) -> (f32[32,16], s8[4096]) {
  %x = f32[32,48]{1,0} parameter(0)
  %w = f32[48,16]{1,0} parameter(1)
  ROOT %c = (f32[32,16]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""
    assert total_flops(matrix_products(text)) == 2 * 32 * 48 * 16
