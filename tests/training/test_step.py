"""One training step: what accumulation, meshes, clipping, decay and schedules mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import others_are_long
from jax.sharding import PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.mesh.shardings import partition_spec, undivided
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.optimizers.decay import decay_mask
from hybridnorm_jax.training.optimizers.schedules import learning_rate, step_numbers
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.step import batch_loss
from tests.schemes import keys_of

BATCH, SEQ = 8, 16

pytestmark = pytest.mark.usefixtures("shared_programs")


def _config(small_config, *, model=None, **sections):
    """Of pre, whose layers are all alike: every other scheme takes longer to compile."""
    train = {"batch_size": BATCH, "seq_len": SEQ, "steps": 20} | sections.pop("train", {})
    optimizer = {"learning_rate": 3e-3, "schedule": "constant"} | sections.pop("optimizer", {})
    return RunConfig(
        model=small_config(**{"scheme": "pre"} | (model or {})),
        train=TrainSection(**train),
        optimizer=OptimizerSection(**optimizer),
        **sections,
    )


def _batch(microbatches=1, seed=0):
    """Sequences that count upwards from a random start: learnable in 20 steps. Rows have unequal numbers of targets."""
    rng = np.random.default_rng(seed)
    stream = (rng.integers(0, 61, (BATCH, 1)) + np.arange(SEQ + 1)) % 61
    weights = (np.arange(SEQ) < rng.integers(1, SEQ + 1, (BATCH, 1))).astype(np.float32)
    flat = {"tokens": stream[:, :-1].astype(np.int32), "targets": stream[:, 1:].astype(np.int32), "weights": weights}
    return {name: array.reshape(microbatches, BATCH // microbatches, SEQ) for name, array in flat.items()}


def _one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def _run(config, mesh, steps, batch):
    program = Program(config, mesh)
    state, losses = program.fresh_state(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def _assert_same_params(ours, expected, tolerance):
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        error = np.linalg.norm(left - right) / np.linalg.norm(right)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


# Compiling a step takes seconds. That a scheme has gradients everywhere is tested more cheaply in test_encoder.py.
# prores_pre trains in test_growing_branches.py.
TRAINED = ("hybrid_star", "siamese_post_pre", "ngpt")
FOUR_LAYERS = {"num_layers": 4, "mlp_dim": 32}


@pytest.mark.parametrize("scheme", others_are_long(sorted(hn.SCHEMES), TRAINED))
def test_every_scheme_trains(scheme, small_config):
    config = _config(small_config, model=keys_of(scheme) | FOUR_LAYERS)
    _, losses, _ = _run(config, _one_device(), 20, _batch())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("sizes", others_are_long([(1, 4, 2), (2, 2, 2)], [(2, 2, 2)]), ids=str)
def test_eight_devices_equal_one(sizes, small_config):
    mesh_section = MeshSection(*sizes)
    config = _config(small_config, model={"scheme": "hybrid_star", **FOUR_LAYERS}, mesh=mesh_section)
    alone, losses, metrics = _run(dataclasses.replace(config, mesh=MeshSection()), _one_device(), 3, _batch())
    together, losses_8, metrics_8 = _run(config, None, 3, _batch())
    np.testing.assert_allclose(losses_8, losses, rtol=1e-6)
    np.testing.assert_allclose(metrics_8["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    # Sums are taken in another order; Adam's division by the root of small second moments amplifies that.
    _assert_same_params(together.params, alone.params, 1e-4)
    query = together.params["run_1"]["attention"]["query"]["kernel"]
    assert len(query.sharding.device_set) == 8
    assert query.addressable_shards[0].data.shape == (3, 32 // sizes[1], 4 // sizes[2], 8)


@pytest.mark.long  # test_packed_loss.py trains documents on another mesh
def test_documents_kept_apart_train_the_same_on_eight_devices(small_config):
    config = _config(small_config, mesh=MeshSection(2, 2, 2))
    batch = _batch()
    batch["segment_ids"] = np.broadcast_to(np.arange(SEQ) // 5, (1, BATCH, SEQ)).astype(np.int32)
    batch["positions"] = np.broadcast_to(np.arange(SEQ) % 5, (1, BATCH, SEQ)).astype(np.int32)
    learned = _config(small_config, model={"positions": "learned", "max_positions": SEQ})
    _, restarted, _ = _run(learned, _one_device(), 1, batch)
    on = {"positions": np.broadcast_to(np.arange(SEQ), (1, BATCH, SEQ)).astype(np.int32)}
    _, running, _ = _run(learned, _one_device(), 1, batch | on)
    assert abs(restarted[0] - running[0]) > 1e-4
    alone = dataclasses.replace(config, mesh=MeshSection())
    _, losses, _ = _run(alone, _one_device(), 2, batch)
    _, losses_8, _ = _run(config, None, 2, batch)
    np.testing.assert_allclose(losses_8, losses, rtol=1e-6)
    _, whole, _ = _run(alone, _one_device(), 2, _batch())
    assert abs(whole[0] - losses[0]) > 1e-4


def test_four_microbatches_equal_one_large_batch(small_config):
    config = _config(small_config)
    state, losses, metrics = _run(config, _one_device(), 2, _batch())
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accumulation=4))
    state_4, losses_4, metrics_4 = _run(parts, _one_device(), 2, _batch(microbatches=4))
    np.testing.assert_allclose(losses_4, losses, rtol=1e-6)
    np.testing.assert_allclose(metrics_4["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    _assert_same_params(state_4.params, state.params, 1e-4)


def test_the_chunked_loss_trains_the_same(small_config):
    config = _config(small_config, model={"scheme": "hybrid_star"}, train={"z_loss": 1e-3})
    chunked = dataclasses.replace(config, train=dataclasses.replace(config.train, loss_chunk=4))
    _, losses, metrics = _run(config, _one_device(), 2, _batch())
    _, losses_chunked, metrics_chunked = _run(chunked, _one_device(), 2, _batch())
    np.testing.assert_allclose(losses_chunked, losses, rtol=1e-6)
    np.testing.assert_allclose(metrics_chunked["z_loss"], metrics["z_loss"], rtol=1e-6)
    assert metrics["z_loss"] > 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradient_of_the_head_is_summed_over_chunks_in_float32(tied, small_config):
    """256 equal chunks in a bfloat16 model: summed in bfloat16, their gradient would be 7 % short."""
    config = small_config(num_layers=1, dtype="bfloat16", tie_embeddings=tied)
    model, same = hn.Decoder(config), jnp.full((1, 256), 7)
    batch = {"tokens": same, "targets": same, "weights": jnp.ones((1, 256))}
    params = jax.jit(model.init)(jax.random.key(0), same)["params"]

    def gradient(chunk):
        grads = jax.jit(jax.grad(lambda params: batch_loss(model, {"params": params}, batch, chunk=chunk).total))(
            params
        )
        return grads["token_embedding"]["embedding"] if tied else grads["head"]["kernel"]

    whole, chunked = gradient(None), gradient(1)
    # Each is a sum in float32 of equal numbers that were rounded to bfloat16 once, by half a unit in 8 bits at most.
    assert np.linalg.norm(chunked - whole) < 2**-8 * np.linalg.norm(whole)


def test_a_batch_without_any_target_changes_no_moment(small_config):
    batch = _batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    state, losses, metrics = _run(_config(small_config), _one_device(), 1, batch)
    assert losses == [0.0]
    assert metrics["grad_norm"] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_step_is_adamw_with_clipping(small_config):
    """Against optax.adamw on the gradient of the mean loss, taken by hand."""
    config = _config(small_config, optimizer={"clip": 0.1, "weight_decay": 0.5})
    program = Program(config, _one_device())
    before = jax.device_get(program.fresh_state().params)
    state, metrics = program.train_step(program.fresh_state(), _batch())
    batch = jax.tree.map(lambda array: array[0], _batch())

    def mean_loss(params):
        logits = hn.Decoder(config.model).apply({"params": params}, batch["tokens"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (nll * batch["weights"]).sum() / batch["weights"].sum()

    @jax.jit
    def by_hand(params):
        grads = jax.grad(mean_loss)(params)
        norm = optax.tree.norm(grads)
        clipped = jax.tree.map(lambda grad: grad * 0.1 / norm, grads)
        mask = decay_mask(config.optimizer, params)
        adamw = optax.adamw(3e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.5, mask=mask)
        updates, _ = adamw.update(clipped, adamw.init(params), params)
        return norm, optax.apply_updates(params, updates)

    norm, expected = by_hand(before)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 0.1
    # The first Adam step is the gradient's sign, times the rate, so entries with almost no gradient may differ by that.
    _assert_same_params(state.params, expected, 1e-3)


def _rates(section, *, steps):
    """The learning rate of every update of a run."""
    numbers = step_numbers(section, steps=steps, tokens_per_step=100, seed=0)
    return learning_rate(section.schedule, numbers, jnp.arange(steps))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # update 0, 1, 3 (the end of warm-up), 5 (half way), 7 (the last of 8)
        ({"schedule": "cosine", "warmup_steps": 4}, [0.25, 0.5, 1.0, 0.55, 0.1]),
        ({"schedule": "linear", "warmup_steps": 4}, [0.25, 0.5, 1.0, 0.55, 0.1]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "wsd", "warmup_steps": 4, "wsd_decay_fraction": 0.25}, [0.25, 0.5, 1.0, 1.0, 0.1]),
        ({"schedule": "wsd", "warmup_steps": 4, "wsd_decay_fraction": 0.75}, [0.25, 0.5, 1.0, 0.55, 0.1]),
        ({"schedule": "cosine", "warmup_tokens": 400}, [0.25, 0.5, 1.0, 0.55, 0.1]),
    ],
    ids=str,
)
def test_schedules(section, expected):
    rates = _rates(OptimizerSection(learning_rate=1.0, **section), steps=8)
    np.testing.assert_allclose(rates[jnp.array([0, 1, 3, 5, 7])], expected, rtol=1e-6)


def test_a_warm_up_longer_than_the_run_only_warms_up():
    rates = _rates(OptimizerSection(learning_rate=1.0, warmup_steps=50), steps=20)
    np.testing.assert_allclose(rates[19], 0.4, rtol=1e-6)


def test_dropout_differs_between_steps_and_microbatches(small_config):
    config = _config(small_config, model={"dropout": 0.2}, optimizer={"learning_rate": 1e-12})
    _, losses, _ = _run(config, _one_device(), 3, _batch())
    assert len(set(losses)) == 3
    # Two microbatches of the same rows drop different units: their mean loss is not that of one.
    twice = {name: np.concatenate([array, array]) for name, array in _batch().items()}
    _, (two,), _ = _run(config, _one_device(), 1, twice)
    assert abs(losses[0] - two) > 1e-5
    _, again, _ = _run(config, _one_device(), 3, _batch())
    assert losses == again


def test_what_a_mesh_cannot_split_is_refused_before_compilation(small_config):
    with pytest.raises(ConfigError, match=r"train\.batch_size.*multiple of mesh replica x data x fsdp x expert = 8"):
        train(_config(small_config, train={"batch_size": 12}))
    with pytest.raises(ConfigError, match="must multiply to the 8 devices"):
        Program(_config(small_config, mesh=MeshSection(3, 1, 1)))
    with pytest.raises(ConfigError, match="must multiply to the 8 devices"):
        make_mesh({"data": -1, "fsdp": 3, "tensor": 1})


def test_a_dimension_that_does_not_divide_stays_whole_and_is_reported(small_config):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    assert partition_spec(("embed", "kv_heads", "head_dim"), (32, 2, 8), mesh) == PartitionSpec("fsdp", None, None)
    program = Program(_config(small_config, mesh=MeshSection(1, 2, 4)))
    lines = undivided(program.abstract_state.params, mesh)
    assert lines == ["kv_heads=2 stays whole: not divisible by tensor", "vocab=61 stays whole: not divisible by tensor"]


def test_every_parameter_has_logical_axes_of_its_rank(small_config, random_params):
    config = small_config(positions="learned", max_positions=16, attention_bias=True, mlp_bias=True, norm_bias=True)
    for path, leaf in jax.tree.leaves_with_path(random_params(config)):
        parts = tuple(part.key for part in path)
        assert len(logical_axes(parts, leaf.ndim)) == leaf.ndim
        assert (logical_axes(parts, leaf.ndim)[0] == "layers") == parts[0].startswith("run_")
    with pytest.raises(KeyError, match="mixer/kernel"):
        logical_axes(("run_0", "mixer", "kernel"), 3)
