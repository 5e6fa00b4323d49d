"""The kernels of the head find what the loss reads of the logits, and its gradients. They run interpreted here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels import tpu_head
from hybridnorm_jax.kernels.loss_kernels import check_loss_kernel
from hybridnorm_jax.kernels.token_logits import TokenLogits
from hybridnorm_jax.kernels.tpu_head import Form, head_table, head_table_and_rows, head_token_logits
from hybridnorm_jax.mesh.device_mesh import use_mesh
from hybridnorm_jax.planning.collectives import read_collectives
from hybridnorm_jax.planning.matrix_products import matrix_products, total_flops
from hybridnorm_jax.planning.memory_traffic import memory_traffic, total_bytes
from hybridnorm_jax.training.step import batch_loss

AXES = ("replica", "data", "fsdp", "expert", "tensor", "context")
ROUNDING = {jnp.float32: 2.0**-24, jnp.bfloat16: 2.0**-8}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(tpu_head, "_interpret", True)


def read_tokens(hidden, table, targets, vocab_first, **form):
    """head_token_logits of a table in any dtype."""
    head = head_table(table, targets, dtype=hidden.dtype)
    return head_token_logits(hidden, head, targets, form=Form(vocab_first, **form))


class Textbook:
    """In float64 what the kernels find, and how far rounding can move each of it.

    Attributes:
      results: log_z, chosen, and the gradients of hidden and of the rows.
      bounds: of their errors. A float32 sum of n terms errs by n 2^-24 of the sum of magnitudes.
    """

    def __init__(self, hidden, rows, targets, gradient, *, rounding, scale=1.0, cap=None):
        """All in float64: hidden (batch, seq, embed), rows (vocab, embed); `rounding` is that of the operands."""
        scaled = scale * np.einsum("bse,ve->bsv", hidden, rows)
        logits = scaled if cap is None else cap * np.tanh(scaled / cap)
        highest = logits.max(-1, keepdims=True)
        weights = np.exp(logits - highest)
        total = weights.sum(-1, keepdims=True)
        one_hot = np.eye(len(rows))[targets]
        of_log_z, of_chosen = gradient.log_z[..., None] * weights / total, gradient.chosen[..., None] * one_hot
        # d_logits is the gradient of the products; slope that of the logits by them.
        slope = scale * (1 if cap is None else 1 - (logits / cap) ** 2)
        d_logits, size = slope * (of_log_z + of_chosen), np.abs(of_log_z) + np.abs(of_chosen)
        d_hidden = np.einsum("bsv,ve->bse", d_logits, rows)
        self.results = [
            (np.log(total) + highest)[..., 0],
            (logits * one_hot).sum(-1),
            d_hidden,
            np.einsum("bsv,bse->ve", d_logits, hidden),
        ]
        single, (vocab, embed), tokens = 2.0**-24, rows.shape, targets.size
        # Of a logit: its sum. Of log_z besides: a sum of exponentials, each of an argument that is rounded, exp, log.
        of_logit = (embed + 2) * single * scale * np.einsum("bse,ve->bsv", np.abs(hidden), np.abs(rows)).max(-1)
        # Exponentials of others than the targets are kept in the dtype of the operands, but with a cap logits are.
        of_slope, of_kept = 0.0, rounding * (1 - one_hot)
        if cap is not None:  # tanh, two products around it, and its slope from it
            of_logit += 4 * single * cap
            of_slope, of_kept = scale * (2 * of_logit[..., None] / cap + 4 * single), 0.0
        of_log_z = of_logit + single * (vocab + 8 + 4 * np.abs(logits).max(-1))
        # Of an entry of d_logits: both in the arguments of two exp, whose distance to the largest logit and from there
        # to log_z is rounded, the two exp, and their products. Then it is rounded.
        distances = 2 * (highest - logits) + np.log(vocab)
        of_exp = np.expm1((of_logit + of_log_z)[..., None] + single * (16 + distances)) + of_kept
        # Below the least number of float32 exp is 0.
        steepest = slope + of_slope
        moved = ((of_exp + 5 * single) * steepest + of_slope) * size
        moved += rounding * (np.abs(d_logits) + moved) + 2.0**-126
        size = steepest * size
        of_hidden = np.einsum("bsv,ve->bse", moved + vocab * single * size, np.abs(rows))
        self.bounds = [
            of_log_z,
            of_logit,
            of_hidden + rounding * (np.abs(d_hidden) + of_hidden),
            np.einsum("bsv,bse->ve", moved + tokens * single * size, np.abs(hidden)),
        ]


def compare(dtype, *, batch=2, seq=65, embed=24, vocab=300, vocab_first=True, size=1.0, **form):
    """The kernels against the textbook with the same inputs; `size` of the logits."""
    rng = np.random.default_rng(0)
    hidden = size * rng.standard_normal((batch, seq, embed)) / np.sqrt(embed)
    rows, targets = rng.standard_normal((vocab, embed)), rng.integers(0, vocab, (batch, seq))
    hidden, rows = (jnp.asarray(x, dtype).astype(jnp.float32) for x in (hidden, rows))
    gradient = TokenLogits(*np.float32(rng.standard_normal((2, batch, seq))))
    gradient.log_z[0, :3] = gradient.chosen[0, :3] = 0  # tokens of weight 0
    wide = [np.float64(x) for x in (hidden, rows)]
    expected = Textbook(*wide, targets, TokenLogits(*map(np.float64, gradient)), rounding=ROUNDING[dtype], **form)

    @jax.jit
    def both(hidden, table):
        read = functools.partial(read_tokens, targets=jnp.asarray(targets, jnp.int32), vocab_first=vocab_first, **form)
        found, pull = jax.vjp(read, hidden, table)
        return *found, *pull(TokenLogits(*map(jnp.asarray, gradient)))

    log_z, chosen, d_hidden, d_table = both(hidden.astype(dtype), rows if vocab_first else rows.T)
    assert (log_z.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, dtype, jnp.float32)
    got = [log_z, chosen, d_hidden, d_table if vocab_first else d_table.T]
    for array, reference, bound in zip(got, expected.results, expected.bounds, strict=True):
        assert np.all(np.abs(np.float64(array) - reference) <= bound)
    np.testing.assert_array_equal(d_hidden[0, :3], 0)


@pytest.mark.parametrize(
    ("dtype", "vocab_first"),
    [(jnp.float32, True), (jnp.float32, False), (jnp.bfloat16, True)],
    ids=["tied", "untied", "tied, in bfloat16"],
)
def test_the_kernels_find_what_the_textbook_says(interpreted, dtype, vocab_first):
    # 600 tokens are five stretches. Of a single one, and of an untied table, XLA for CPUs makes products of transposed
    # bfloat16, which it then cannot compute.
    compare(dtype, seq=300, vocab_first=vocab_first)


@pytest.mark.parametrize("shape", [{"vocab": 5, "seq": 1, "embed": 3}, {"vocab": 512, "seq": 128, "embed": 128}])
def test_sizes_below_a_tile_and_whole_tiles(interpreted, shape):
    compare(jnp.float32, **shape)


def test_a_core_without_room_for_all_tokens_takes_them_in_blocks(interpreted, monkeypatch):
    monkeypatch.setattr(tpu_head, "token_block", lambda tokens, embed, dtype, capped: 128)
    compare(jnp.float32, batch=3, seq=100)


@pytest.mark.parametrize("form", [{"scale": 0.3}, {"cap": 2.0}, {"scale": 3.0, "cap": 4.0}], ids=str)
def test_logits_that_are_scaled_and_capped(interpreted, form):
    compare(jnp.float32, **form)


@pytest.mark.parametrize("form", [{"size": 20.0}, {"size": 20.0, "cap": 40.0}, {"cap": 0.01}], ids=str)
def test_bfloat16_loses_no_more_where_logits_are_large_or_the_cap_is_small(interpreted, form):
    compare(jnp.bfloat16, seq=300, **form)


@pytest.mark.parametrize("form", [{"size": 1e4}, {"size": 60.0, "cap": 100.0}], ids=str)
def test_logits_far_beyond_the_range_of_exp(interpreted, form):
    """Where there is a cap, the target's gradient needs its logit, and its exponential is 0."""
    compare(jnp.float32, **form)


@pytest.mark.parametrize("shape", [(1, 2, 4, 1, 1, 1), (1, 1, 2, 1, 1, 4)], ids=["fsdp", "a split sequence"])
def test_on_a_mesh_each_device_takes_its_tokens(interpreted, shape):
    with use_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 6)):
        compare(jnp.float32, batch=8, seq=20)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_on_a_mesh_the_gradient_of_the_table_is_summed_once_and_nothing_else_is_sent(interpreted, tied):
    """Also where it is the sum of what the head and the lookup of rows give."""
    mesh = jax.make_mesh((1, 2, 4, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 6)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    hidden = jax.ShapeDtypeStruct((8, 20, 24), jnp.float32, sharding=rows)
    targets = jax.ShapeDtypeStruct((8, 20), jnp.int32, sharding=rows)
    table = jax.ShapeDtypeStruct((300, 24), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def gradients(hidden, table, targets):
        def read(hidden, table):
            if not tied:
                return read_tokens(hidden, table, targets, vocab_first=True)
            head, rows = head_table_and_rows(table, targets, dtype=hidden.dtype)
            return head_token_logits(hidden + rows, head, targets, form=Form(vocab_first=True))

        found, pull = jax.vjp(read, hidden, table)
        return pull(found)

    places = rows, NamedSharding(mesh, PartitionSpec())
    with use_mesh(mesh):
        text = jax.jit(gradients, out_shardings=places).lower(hidden, table, targets).compile().as_text()
    assert read_collectives(text).kinds.keys() == {"all-reduce"}
    assert read_collectives(text).kinds["all-reduce"].bytes == 300 * 24 * 4


def test_rows_of_tokens_that_are_not_there_are_no_numbers():
    table = jnp.arange(12.0).reshape(4, 3)
    _, rows = head_table_and_rows(table, jnp.asarray([[3, -1, 4, 0]]), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rows[0, [0, 3]], table[jnp.asarray([3, 0])])
    assert jnp.isnan(rows[0, 1:3]).all()
    assert rows.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("tied", "shape"),
    [(True, (1, 1, 4, 1, 1, 1)), (False, (1, 1, 4, 1, 1, 1)), (True, (1, 1, 2, 1, 1, 2))],
    ids=["tied", "untied", "split sequences"],
)
def test_the_loss_of_a_model_is_the_one_that_xla_computes(interpreted, small_config, random_params, tied, shape):
    """Whole and in chunks, with a z-loss and weights of zero, on a mesh: the same loss and the same gradients."""
    config = small_config(num_layers=1, tie_embeddings=tied, logit_scale=0.7, logit_cap=9.0)
    rng = np.random.default_rng(2)
    batch = {name: rng.integers(0, 61, (4, 12)).astype(np.int32) for name in ("tokens", "targets")}
    batch["weights"] = (rng.random((4, 12)) < 0.7).astype(np.float32)
    params = random_params(config)

    def gradients(kernel, chunk):
        def total(params):
            found = batch_loss(hn.Decoder(config), {"params": params}, batch, chunk=chunk, kernel=kernel, z_loss=0.1)
            return found.total, found.sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    with use_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 6, devices=jax.devices()[:4])):
        expected = gradients("xla", None)
        for chunk in (None, 6):
            for reference, found in zip(
                jax.tree.leaves(expected), jax.tree.leaves(gradients("pallas", chunk)), strict=True
            ):
                # Sums of up to 48 x 61 terms in another order: by norm, see the note on gradients in test_step.py.
                assert np.linalg.norm(found - reference) <= 1e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platform": "cpu"}, "needs platform tpu, this is cpu"),
        ({"dtype": "float64"}, "needs model.dtype bfloat16 or float32, not float64"),
        ({"more_than_table": "model.head_bias=true"}, "besides its table, which model.head_bias=true needs"),
        ({"split_by": ("tensor",)}, "mesh axis tensor splits it"),
        ({"width": 65536}, "model.d_model=65536"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_kernel_cannot_do_is_said_in_one_line(arguments, message):
    possible = {
        "platform": "tpu",
        "dtype": "bfloat16",
        "width": 64,
        "capped": False,
        "more_than_table": None,
        "split_by": (),
    }
    check_loss_kernel("pallas", **possible)
    check_loss_kernel("xla", **possible | arguments)
    with pytest.raises(ConfigError) as refusal:
        check_loss_kernel("pallas", **possible | arguments)
    assert str(refusal.value).startswith("train.loss_kernel=pallas: ")
    assert message in str(refusal.value)
    assert str(refusal.value).endswith("; use xla")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"head_bias": True}, "model.head_bias=true"),
        ({"scheme": "ngpt"}, "model.scheme=ngpt"),
        ({"logit_cap": 30.0, "logit_scale": 0.5}, None),
    ],
    ids=str,
)
def test_a_model_says_what_else_its_head_has(small_config, keys, found):
    assert small_config(**keys).more_than_head_table == found


# ---- The TPU compiler works without a TPU.


def compiled(topology, *, tokens, embed, vocab, dtype=jnp.bfloat16, vocab_first=True):
    """The text of value and gradients on one chip."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = jax.make_mesh((1,) * 6, AXES, axis_types=(AxisType.Auto,) * 6, devices=[device])
    place = NamedSharding(mesh, PartitionSpec())
    hidden = jax.ShapeDtypeStruct((1, tokens, embed), dtype, sharding=place)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=place)
    shape = (vocab, embed) if vocab_first else (embed, vocab)
    table = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def loss(hidden, table, targets):
        found = read_tokens(hidden, table, targets, vocab_first=vocab_first)
        return jnp.sum(found.log_z - found.chosen)

    with use_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table, targets).compile().as_text()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 300, "embed": 200, "vocab": 61, "dtype": jnp.float32},
        {"tokens": 16384, "embed": 1024, "vocab": 1000, "vocab_first": False},
        pytest.param({"tokens": 8192, "embed": 2048, "vocab": 777, "dtype": jnp.float32}, marks=pytest.mark.long),
        {"tokens": 4096, "embed": 4096, "vocab": 1024},
    ],
    ids=str,
)
def test_what_a_core_holds_compiles(tpu_devices, topology, shape):
    assert compiled(topology, **shape).count('custom_call_target="tpu_custom_call"') == 2


def test_exponentials_are_written_once_and_read_once(tpu_devices):
    """Three products, and nothing as large as the logits besides."""
    tokens, embed, vocab = 2048, 1024, 20480
    text = compiled("v5e:2x2", tokens=tokens, embed=embed, vocab=vocab)
    assert total_flops(matrix_products(text)) == 3 * 2 * tokens * embed * vocab
    exponentials, table, activations = 2 * tokens * vocab, embed * vocab, tokens * embed
    # The table is read in float32 once and rounded, read in bfloat16 twice, and its gradient written in float32.
    least = 2 * exponentials + (4 + 2 + 2 * 2 + 4) * table
    assert least <= total_bytes(memory_traffic(text)) <= least + 32 * activations
