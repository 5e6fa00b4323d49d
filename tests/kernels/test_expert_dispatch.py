"""The experts are what their formula says, whoever computes them; a dispatch that cannot do what is asked says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal, others_are_long
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from hybridnorm_jax.kernels import blocked_experts, tpu_gmm, tpu_visits
from hybridnorm_jax.kernels.expert_dispatch import apply_experts, apply_grouped_experts
from hybridnorm_jax.kernels.expert_rows import collect, sort_by_expert, spread
from hybridnorm_jax.kernels.swiglu import ExpertKernels

EMBED, MLP = 12, 20
SORTED = ("blocked", "ragged")
TPU = ("gmm", "fused")


def draw(tokens, experts, k, dtype=np.float64, seed=0):
    """(x, gate, up, down, weights), of size about 1 in every product."""
    rng = np.random.default_rng(seed)
    shapes = (tokens, EMBED), (experts, EMBED, MLP), (experts, EMBED, MLP), (experts, MLP, EMBED), (tokens, k)
    return tuple(jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.25, dtype) for shape in shapes)


def choose(tokens, experts, k, seed=0, scores=0.0):
    """Distinct expert ids for each token; those with high scores more often."""
    noise = np.random.default_rng(seed).random((tokens, experts))
    return jnp.asarray(np.argsort(-(noise + scores), axis=1)[:, :k])


def cotangent(inputs):
    """A fixed random cotangent of the result."""
    return jnp.asarray(np.random.default_rng(9).standard_normal(inputs[0].shape), inputs[0].dtype)


def value_and_gradients(function, *inputs):
    """The value and the gradients of all inputs, for a fixed random cotangent."""
    d_out = cotangent(inputs)

    @jax.jit
    def both(*inputs):
        value, pull = jax.vjp(function, *inputs)
        return value, *pull(d_out)

    return both(*inputs)


@functools.cache
def by_any_choice(dispatch):
    """(chosen, inputs, d_out) -> value and gradients of apply_experts, compiled once for all choices of one shape."""

    @jax.jit
    def both(chosen, inputs, d_out):
        value, pull = jax.vjp(by_dispatch(dispatch, chosen), *inputs)
        return value, *pull(d_out)

    return both


def by_dispatch(dispatch, chosen):
    """apply_experts as a function of the arrays that `draw` gives."""

    def function(x, gate, up, down, weights):
        return apply_experts(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=dispatch)

    return function


def assert_equal_to(expected, got, tolerance):
    for reference, array in zip(expected, got, strict=True):
        array, reference = np.asarray(array, np.float64), np.asarray(reference, np.float64)
        np.testing.assert_allclose(array, reference, rtol=0, atol=tolerance * max(1, np.abs(reference).max(initial=0)))


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run here."""
    monkeypatch.setattr(tpu_gmm, "gmm", functools.partial(tpu_gmm.gmm, interpret=True))
    monkeypatch.setattr(tpu_visits, "pallas_call", functools.partial(tpu_visits.pallas_call, interpret=True))


def test_dense_is_the_formula():
    with jax.enable_x64(True):
        inputs, chosen = draw(9, 5, 3), choose(9, 5, 3)
        got = by_dispatch("dense", chosen)(*inputs)
    x, gate, up, down, weights = (np.asarray(array) for array in inputs)
    for token, row in enumerate(x):
        expected = 0
        for weight, expert in zip(weights[token], np.asarray(chosen)[token], strict=True):
            gated = row @ gate[expert]
            expected += weight * (gated / (1 + np.exp(-gated)) * (row @ up[expert])) @ down[expert]
        np.testing.assert_allclose(got[token], expected, rtol=1e-12, atol=1e-12)


ROUTINGS = {
    "balanced": (np.arange(32).reshape(16, 2) % 8, 8),
    "all to one": (np.full((300, 1), 2), 4),
    "all to one pair": (np.tile([3, 0], (70, 1)), 4),
    "empty experts": (np.asarray(choose(40, 3, 2)) * 2 + 1, 7),
    "unaligned groups": (np.repeat(np.arange(4), [1, 130, 17, 51])[:, None], 4),
    "every expert": (choose(10, 4, 4), 4),
    "one expert": (np.zeros((5, 1), int), 1),
    "one token": (np.array([[5, 1, 6]]), 8),
    "one token, k=1": (np.array([[2]]), 3),
}


@pytest.mark.parametrize(("routing", "dispatch"), diagonal(ROUTINGS, SORTED, apart=2))
def test_sorted_dispatches_equal_dense_in_value_and_gradient(dispatch, routing):
    with jax.enable_x64(True):
        chosen, experts = ROUTINGS[routing]
        inputs, chosen = draw(len(chosen), experts, chosen.shape[1]), jnp.asarray(chosen)
        d_out = cotangent(inputs)
        expected = by_any_choice("dense")(chosen, inputs, d_out)
        got = by_any_choice(dispatch)(chosen, inputs, d_out)
    assert all(np.abs(array).max() > 0 for array in expected)
    assert_equal_to(expected, got, 1e-10)


# float32: some rounding errors of 6e-8 in sums of at most 300 terms. bfloat16: as many of 4e-3, which the gate, the up
# product, the hidden layer and every row of the result are rounded by.
# (The kernels for TPUs are in float32 in a test below, too.)
NARROW = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}
CASES = [(dispatch, dtype) for dispatch in ("dense", *TPU, *SORTED) for dtype in NARROW]
QUICK = [(dispatch, dtype) for dispatch, dtype in CASES if dispatch in SORTED or dtype == jnp.bfloat16]


@pytest.mark.parametrize("case", others_are_long(CASES, QUICK), ids=lambda case: f"{case[0]}-{case[1].__name__}")
def test_narrow_dtypes_stay_within_their_rounding(interpreted, case):
    dispatch, dtype = case
    tolerance = NARROW[dtype]
    with jax.enable_x64(True):
        rounded, chosen = draw(70, 6, 2, dtype), choose(70, 6, 2, scores=np.array([0, 0, 2, 0.3, -2, 0.1]))
        wide = (array.astype(np.float64) for array in rounded)
        wide = tuple(wide)
        expected = by_any_choice("dense")(chosen, wide, cotangent(wide))
    got = value_and_gradients(by_dispatch(dispatch, chosen.astype(np.int32)), *rounded)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_equal_to(expected, got, tolerance)


@pytest.mark.parametrize("dispatch", ["dense", *TPU, *SORTED])
def test_weights_keep_their_own_dtype(interpreted, dispatch):
    *inputs, weights = draw(6, 3, 2, jnp.bfloat16)
    got = value_and_gradients(by_dispatch(dispatch, choose(6, 3, 2)), *inputs, weights.astype(jnp.float32))
    assert [array.dtype.name for array in got] == ["bfloat16"] * 5 + ["float32"]


@functools.cache
def compiled(dispatch, block, tokens, experts, k):
    def both(inputs, chosen, d_out):
        value, pull = jax.vjp(by_dispatch(dispatch, chosen), *inputs)
        return value, *pull(d_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_experts, "block_size", lambda rows, experts: block)
        shapes = jax.eval_shape(lambda: (draw(tokens, experts, k), choose(tokens, experts, k)))
        return jax.jit(both).lower(*shapes, shapes[0][0]).compile()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(1, 3, 3), (13, 3, 1), (13, 8, 2)]),
    block=st.sampled_from([1, 4, 32]),
    scores=st.lists(st.floats(-2, 2), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_blocked_equals_dense_for_any_routing_and_block(shape, block, scores, seed):
    tokens, experts, _ = shape
    with jax.enable_x64(True):
        inputs, chosen = draw(*shape, seed=seed), choose(*shape, seed, np.array(scores[:experts]))
        d_out = jnp.asarray(np.random.default_rng(seed).standard_normal((tokens, EMBED)))
        expected = compiled("dense", 0, *shape)(inputs, chosen, d_out)
        got = compiled("blocked", block, *shape)(inputs, chosen, d_out)
    assert_equal_to(expected, got, 1e-10)


@pytest.mark.parametrize("dispatch", others_are_long(["dense", *SORTED], ["blocked"]))
def test_layers_under_scan_with_checkpoint(dispatch):
    with jax.enable_x64(True):
        layers = [(draw(11, 4, 2, seed=layer), choose(11, 4, 2, seed=layer)) for layer in range(3)]
        x = layers[0][0][0]
        stacked = [jnp.stack(leaves) for leaves in zip(*(inputs[1:] for inputs, _ in layers), strict=True)]
        choices = jnp.stack([chosen for _, chosen in layers])

        def unrolled(x, *stacked):
            for layer, chosen in enumerate(choices):
                x = x + by_dispatch("dense", chosen)(x, *(leaf[layer] for leaf in stacked))
            return x

        def scanned(x, *stacked):
            @jax.checkpoint
            def body(x, layer):
                arrays, chosen = layer
                return x + by_dispatch(dispatch, chosen)(x, *arrays), None

            return jax.lax.scan(body, x, (stacked, choices))[0]

        expected, got = (value_and_gradients(function, x, *stacked) for function in (unrolled, scanned))
    assert_equal_to(expected, got, 1e-10)


def draw_grouped(sizes, rows, dtype=np.float64):
    x, gate, up, down, weights = draw(rows, len(sizes), 1, dtype)
    return (x, gate, up, down, weights[:, 0]), jnp.asarray(sizes, jnp.int32)


def grouped(dispatch, sizes):
    def function(rows, gate, up, down, row_weights):
        return apply_grouped_experts(rows, row_weights, sizes, ExpertKernels(gate, up, down), dispatch=dispatch)

    return function


@functools.cache
def by_any_sizes(dispatch):
    """(sizes, inputs, d_out) -> value and gradients of apply_grouped_experts, compiled once for all sizes."""

    @jax.jit
    def both(sizes, inputs, d_out):
        value, pull = jax.vjp(grouped(dispatch, sizes), *inputs)
        return value, *pull(d_out)

    return both


@pytest.mark.parametrize("sizes", [(3, 0, 9, 1), (0, 0, 0, 0), (0, 20, 0, 0), (5, 5, 5, 5), (0, 0, 0, 17)])
@pytest.mark.parametrize("dispatch", ["dense", *TPU, *SORTED])
def test_rows_past_the_last_group_are_zero_whatever_they_hold(interpreted, dispatch, sizes):
    dtype, tolerance = (np.float32, 2e-6) if dispatch in TPU else (np.float64, 1e-10)
    used, owner = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    with jax.enable_x64(dtype is np.float64):
        (rows, *kernels, row_weights), sizes = draw_grouped(sizes, 20, dtype)
        d_out = np.random.default_rng(1).standard_normal(rows.shape).astype(dtype)

        def filled(value):
            """The inputs and the cotangent with this in all rows that no expert has."""
            past = (np.arange(20) >= used)[:, None]
            inputs = np.where(past, value, rows), *kernels, np.where(past[:, 0], value, row_weights)
            return inputs, np.where(past, value, d_out)

        value, d_rows, *d_kernels, d_weights = by_any_sizes(dispatch)(sizes, *filled(np.array(np.nan, dtype)))
        # The formula's sums are over all rows, of which zeros are none.
        inputs, d_out = filled(np.zeros((), dtype))
        chosen = np.pad(owner, (0, 20 - used))[:, None]
        expected = by_any_choice("dense")(chosen, (*inputs[:-1], inputs[-1][:, None]), d_out)
    expected_value, expected_rows, *expected_kernels, expected_weights = map(np.asarray, expected)
    for array in (value, d_rows, d_weights):
        assert not np.asarray(array[used:]).any()  # NaN would be true
    assert_equal_to(
        (expected_value[:used], expected_rows[:used], *expected_kernels, expected_weights[:used, 0]),
        (value[:used], d_rows[:used], *d_kernels, d_weights[:used]),
        tolerance,
    )


def test_a_product_that_reads_and_leaves_nan_past_the_last_group_does_no_harm(monkeypatch):
    def careless(rows, kernels, sizes):
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
        product = jnp.einsum("rd,edm,re->rm", rows, kernels, jax.nn.one_hot(expert, len(sizes)))
        return jnp.where((expert < len(sizes))[:, None], product, jnp.nan)

    monkeypatch.setattr("hybridnorm_jax.kernels.expert_dispatch.ragged_product", careless)
    inputs, sizes = draw_grouped((3, 0, 9, 1), 20, np.float32)
    expected, got = (value_and_gradients(grouped(dispatch, sizes), *inputs) for dispatch in ("blocked", "ragged"))
    assert_equal_to(expected, got, 2e-6)


def test_nan_in_one_experts_rows_stays_out_of_the_other_experts_kernels():
    (rows, *kernels, row_weights), sizes = draw_grouped((5, 4, 5), 16, np.float32)
    rows = rows.at[6].set(jnp.nan)
    clean = value_and_gradients(grouped("blocked", sizes), rows.at[6].set(0), *kernels, row_weights)
    got = value_and_gradients(grouped("blocked", sizes), rows, *kernels, row_weights)
    for name, array, reference in zip(("gate", "up", "down"), got[2:5], clean[2:5], strict=True):
        assert np.isnan(array[1]).any(), name
        np.testing.assert_array_equal(array[::2], reference[::2])


@pytest.mark.parametrize("dispatch", others_are_long(["dense", *SORTED], SORTED))
def test_shards_of_the_experts_add_up_to_all_of_them(dispatch):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    tokens, experts = PartitionSpec("data"), PartitionSpec("expert")

    def local(x, gate, up, down, weights, chosen):
        order, sizes = sort_by_expert(chosen, 8)
        rows, row_weights = spread(x, order), weights.reshape(-1)[order.choice_of_row]
        first = 2 * jax.lax.axis_index("expert")
        start, sizes = (jnp.cumsum(sizes) - sizes)[first], jax.lax.dynamic_slice_in_dim(sizes, first, 2)
        # The local experts' rows moved to the front of a buffer that could hold all rows.
        rows, row_weights = jnp.roll(rows, -start, 0), jnp.roll(row_weights, -start)
        outputs = grouped(dispatch, sizes)(rows, gate, up, down, row_weights)
        return jax.lax.psum(collect(jnp.roll(outputs, start, 0), order), "expert")

    with jax.enable_x64(True), jax.set_mesh(mesh):
        inputs, chosen = draw(32, 8, 2), choose(32, 8, 2, scores=np.array([0, 0, 2, 0, 0, 0, -2, -2]))
        specs = (tokens, experts, experts, experts, tokens, tokens)
        sharded = jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)
        expected = value_and_gradients(by_dispatch("dense", chosen), *inputs)
        got = value_and_gradients(lambda *inputs: sharded(*inputs, chosen), *inputs)
    assert_equal_to(expected, got, 1e-10)


def test_memory_of_blocked_does_not_grow_with_the_number_of_experts():
    tokens, k = 256, 2

    def temporaries(dispatch, experts):
        inputs, chosen = draw(tokens, experts, k, np.float32), choose(tokens, experts, k)
        both = jax.jit(lambda chosen, *inputs: jax.vjp(by_dispatch(dispatch, chosen), *inputs)[1](inputs[0]))
        return both.lower(chosen, *inputs).compile().memory_analysis().temp_size_in_bytes

    hidden_layers = tokens * (64 - 4) * MLP * 4
    assert temporaries("dense", 64) - temporaries("dense", 4) > hidden_layers
    assert temporaries("blocked", 64) - temporaries("blocked", 4) < hidden_layers / 20


def test_only_experts_with_rows_are_visited_each_once():
    sizes = jnp.array([0, 5, 0, 17, 0, 8], jnp.int32)

    def note(group, carry):
        place, visits = carry
        return place + 1, visits.at[place].set(jnp.stack([group.expert, group.start, group.size]))

    places, visits = blocked_experts.for_each_group(sizes, note, (0, jnp.zeros((6, 3), jnp.int32)))
    assert places == 3
    np.testing.assert_array_equal(visits[:3], [[1, 0, 5], [3, 5, 17], [5, 22, 8]])


@pytest.mark.parametrize(("rows", "experts", "expected"), [(1, 1, 8), (100, 8, 16), (128, 8, 16), (10**6, 8, 128)])
def test_blocks_are_no_longer_than_the_mean_group_needs(rows, experts, expected):
    assert blocked_experts.block_size(rows, experts) == expected


# ---- The TPU compiler works without a TPU.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("tokens", "embed", "mlp", "experts", "k"), [(2048, 2048, 1024, 8, 8), (100, 96, 160, 4, 2)])
@pytest.mark.parametrize(("dispatch", "kernels"), [("gmm", 9), ("fused", 6), ("blocked", 0)])
def test_gradient_compiles_for_tpu(tpu_devices, dispatch, kernels, tokens, embed, mlp, experts, k, dtype):
    place = jax.sharding.SingleDeviceSharding(tpu_devices[0])
    shapes = (tokens, embed), (experts, embed, mlp), (experts, embed, mlp), (experts, mlp, embed), (tokens, k)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    chosen = jax.ShapeDtypeStruct((tokens, k), jnp.int32, sharding=place)

    def both(inputs, chosen, d_out):
        value, pull = jax.vjp(by_dispatch(dispatch, chosen), *inputs)
        return value, *pull(d_out)

    compiled = jax.jit(both).lower(inputs, chosen, inputs[0]).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
