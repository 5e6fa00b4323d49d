"""Products with a kernel are those of NumPy, gradients too; on one CPU they are products of two matrices."""

import contextlib
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long
from flax import linen as nn
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.kernels import dense_products
from hybridnorm_jax.kernels.dense_products import dot_general, head_product, rows_product
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.feed_forward import FeedForward

# name -> shapes of x and of the kernel, their contracted dimensions, and the same as an einsum
PRODUCTS = {
    "up": ((2, 5, 3), (3, 7), ((2,), (0,)), "bse,em->bsm"),
    "query": ((2, 5, 6), (6, 2, 3), ((2,), (0,)), "bse,ehd->bshd"),
    "out": ((2, 5, 2, 3), (2, 3, 6), ((2, 3), (0, 1)), "bshd,hde->bse"),
    "tied head": ((2, 5, 3), (7, 3), ((2,), (1,)), "bse,ve->bsv"),
}
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "context": 2}


def _mesh(sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def _inputs(name, dtype=np.float64):
    of_x, of_kernel, contracted, spec = PRODUCTS[name]
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(of_x).astype(dtype), rng.standard_normal(of_kernel).astype(dtype)
    return x, kernel, partial(rows_product, dimension_numbers=(contracted, ((), ()))), spec


def _with_gradients(product, x, kernel, cotangent):
    value, pull = jax.vjp(product, x, kernel)
    return value, *pull(cotangent)


def _products_of(jaxpr):
    """The dimension numbers of every dot_general and the ranks of its operands, in inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), ranks = equation.params["dimension_numbers"], [v.aval.ndim for v in equation.invars]
            found.append((tuple(len(dimensions) for dimensions in contracted), ranks))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += _products_of(inner)
    return found


def _traced(name, product=None):
    x, kernel, ours, spec = _inputs(name, np.float32)
    cotangent = np.ones(np.einsum(spec, x, kernel).shape, np.float32)
    return jax.make_jaxpr(partial(_with_gradients, product or ours))(x, kernel, cotangent).jaxpr


@pytest.mark.parametrize("sizes", [ONE, EIGHT], ids=["one device", "eight devices"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_and_gradients_are_numpys(name, sizes):
    x, kernel, product, spec = _inputs(name)
    inputs, rest = spec.split("->")
    of_x, of_kernel = inputs.split(",")
    cotangent = np.random.default_rng(1).standard_normal(np.einsum(spec, x, kernel).shape)
    with jax.enable_x64(True), jax.set_mesh(_mesh(sizes)):
        found = jax.jit(partial(_with_gradients, product))(x, kernel, cotangent)
    expected = (
        np.einsum(spec, x, kernel),
        np.einsum(f"{rest},{of_kernel}->{of_x}", cotangent, kernel),
        np.einsum(f"{of_x},{rest}->{of_kernel}", x, cotangent),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)  # sums of at most 14 products of about 1


@pytest.mark.parametrize("name", PRODUCTS)
def test_on_one_cpu_all_three_products_are_of_two_matrices(name):
    with jax.set_mesh(_mesh(ONE)):
        assert _products_of(_traced(name)) == [((1, 1), [2, 2])] * 3


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("platform", ["tpu", "gpu", "eight CPUs", "no mesh, but eight devices"])
def test_elsewhere_the_program_is_as_it_was(name, platform):
    plain = partial(jax.lax.dot_general, dimension_numbers=(PRODUCTS[name][2], ((), ())))
    with _as_on(platform):
        assert str(_traced(name)) == str(_traced(name, plain))


def _as_on(platform):
    if platform == "eight CPUs":
        return jax.set_mesh(_mesh(EIGHT))
    if platform == "no mesh, but eight devices":
        return contextlib.nullcontext()
    one = _mesh(ONE).abstract_mesh
    device = type(one.abstract_device)(device_kind="some", num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh(one.axis_sizes, one.axis_names, abstract_device=device))


def test_a_single_token_of_each_sequence_is_multiplied_as_it_was():
    kernel, contracted = np.ones((4, 2, 3), np.float32), (((2,), (0,)), ((), ()))
    for shape in ((1, 1, 4), (3, 1, 4), (1, 5, 4)):
        with jax.set_mesh(_mesh(ONE)):
            traced = [
                str(jax.make_jaxpr(partial(product, dimension_numbers=contracted))(np.ones(shape, np.float32), kernel))
                for product in (rows_product, jax.lax.dot_general)
            ]
        assert traced[0] == traced[1]


def test_narrow_operands_are_summed_as_asked():
    x, kernel, product, spec = _inputs("up", jnp.bfloat16)
    with jax.set_mesh(_mesh(ONE)):
        found = product(x, kernel, preferred_element_type=jnp.float32)
    exact = np.einsum(spec, x.astype(np.float64), kernel.astype(np.float64))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)  # products of bfloat16 are exact in float32


def test_a_product_with_batch_dimensions_passes_through():
    a, b = np.ones((2, 3, 4), np.float32), np.ones((2, 4, 5), np.float32)
    with jax.set_mesh(_mesh(ONE)):
        found = dot_general(a, b, (((2,), (1,)), ((0,), (0,))))
    np.testing.assert_array_equal(found, np.full((2, 3, 5), 4))


def _modules():
    with_groups = hn.Attention(num_heads=4, num_kv_heads=2, head_dim=3, q_norm="head", use_bias=True)
    experts = hn.MoE(num_experts=4, experts_per_token=2, mlp_dim=5, use_bias=True)
    return {"attention": with_groups, "feed-forward": hn.FeedForward(mlp_dim=5, use_bias=True), "experts": experts}


@pytest.mark.parametrize("name", ["attention", "feed-forward", "experts"])
def test_modules_are_the_same_flat_and_apart_and_under_vmap(name):
    module = _modules()[name].clone(dtype=jnp.float64, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5, 8)))
        params = jax.jit(module.init)(jax.random.key(0), x[0])

        def loss(params, x):
            return jnp.square(module.apply(params, x)).sum()

        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        apart = [both(params, one) for one in x]
        with jax.set_mesh(_mesh(ONE)):
            flat = [both(params, one) for one in x]
            mapped = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), in_axes=(None, 0)))(params, x)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *apart)
    for found in (jax.tree.map(lambda *leaves: np.stack(leaves), *flat), mapped):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), found, stacked)


def test_a_dense_layer_whose_input_is_split_over_eight_devices():
    mesh = _mesh(EIGHT)
    layer = nn.Dense(6, dot_general=dot_general)
    x = np.random.default_rng(0).standard_normal((4, 8, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        params = jax.jit(layer.init)(jax.random.key(0), x)
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context")))
        found = jax.jit(layer.apply)(params, split)
    assert len(found.sharding.device_set) == 8
    kernel = np.asarray(params["params"]["kernel"])
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", others_are_long([jnp.float32, jnp.bfloat16], [jnp.float32]), ids=["float32", "bfloat16"]
)
def test_on_a_tpu_the_order_of_the_gradients_changes_none_of_them(monkeypatch, dtype):
    x = jax.random.normal(jax.random.key(0), (3, 4, 6), dtype)
    feed_forward = FeedForward(mlp_dim=8, dtype=dtype)
    params = feed_forward.init(jax.random.key(1), x)

    def gradients(params, x):
        return jax.grad(lambda params, x: jnp.sin(feed_forward.apply(params, x)).sum(), argnums=(0, 1))(params, x)

    expected = gradients(params, x)
    monkeypatch.setattr(dense_products, "traced_platform", lambda: "tpu")
    assert "optimization_barrier" in str(jax.make_jaxpr(gradients)(params, x))
    for reference, got in zip(jax.tree.leaves(expected), jax.tree.leaves(gradients(params, x)), strict=True):
        np.testing.assert_array_equal(got, reference)
    of_each, _ = jax.vmap(gradients, in_axes=(None, 0))(params, x[:, None])
    for reference, got in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(of_each), strict=True):
        # Sums over four tokens, then over three sequences, each rounded.
        atol = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(reference).max())
        np.testing.assert_allclose(got.sum(0).astype(jnp.float32), reference.astype(jnp.float32), rtol=0, atol=atol)


# ---- the head on a GPU


@pytest.mark.parametrize(("shape", "contracted"), [((7, 16), 1), ((16, 7), 0)])
def test_on_a_gpu_the_heads_gradient_has_narrow_factors_and_a_wide_sum(monkeypatch, shape, contracted):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal((2, 5, 7)), jnp.float32)
    product = partial(head_product, dimension_numbers=(((2,), (contracted,)), ((), ())))
    elsewhere = _with_gradients(product, x, kernel, cotangent)
    monkeypatch.setattr(dense_products, "traced_platform", lambda: "gpu")
    value, d_x, d_kernel = _with_gradients(product, x, kernel, cotangent)
    np.testing.assert_array_equal(value, elsewhere[0])
    # In float64, of the factors as bfloat16 has them: what is left are the roundings of the results.
    factors = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (x, kernel, cotangent))
    of_x, of_kernel, of_logits = factors
    vocab_first = of_kernel if contracted == 1 else of_kernel.T
    expected = np.einsum("bsv,bse->ve", of_logits, of_x)
    np.testing.assert_allclose(d_kernel, expected if contracted == 1 else expected.T, rtol=0, atol=2e-6)
    d_x_expected = of_logits @ vocab_first
    np.testing.assert_allclose(np.asarray(d_x, np.float64), d_x_expected, rtol=2.0**-8, atol=1e-6)
    assert (d_x.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)


def test_in_float32_the_head_is_the_same_on_a_gpu(monkeypatch):
    x, kernel, product, _ = _inputs("tied head", np.float32)
    monkeypatch.setattr(dense_products, "traced_platform", lambda: "gpu")
    got = head_product(x, kernel, product.keywords["dimension_numbers"])
    np.testing.assert_array_equal(got, product(x, kernel, preferred_element_type=jnp.float32))
