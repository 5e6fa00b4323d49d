"""Every optimizer is its reference implementation for 20 steps, and computes on a mesh what one device computes."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_problem as problem
import pytest
from covering import others_are_long
from jax.sharding import NamedSharding

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.optimizer_kinds import OPTIMIZERS, OptimizerKind, averaging_settings
from hybridnorm_jax.config.optimizer_section import UNREAD_BY_SCHEDULE, OptimizerSection
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.sharding_rules import RULES
from hybridnorm_jax.mesh.shardings import tree_shardings
from hybridnorm_jax.training.optimizers import directions
from hybridnorm_jax.training.optimizers.adafactor import scale_by_adafactor
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.directions import Places
from hybridnorm_jax.training.optimizers.groups import path_text
from hybridnorm_jax.training.optimizers.moments import round_at_random
from hybridnorm_jax.training.optimizers.muon import is_muon_matrix, orthogonalized
from hybridnorm_jax.training.optimizers.rates import schedule_of
from hybridnorm_jax.training.optimizers.schedule_free import averaged_params
from hybridnorm_jax.training.optimizers.schedules import step_numbers

GOLDENS = Path(__file__).parents[1] / "goldens/optimizers"
# Those of tests/goldens/optimizers/make.py. Everything decays there.
ADAM = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.9, "eps": 1e-3}
MUON = {"name": "muon", "muon_momentum": 0.9, "muon_dtype": "float32", **ADAM}
COMMON = {"schedule": "constant", "weight_decay": 0.3, "clip": None, "decay_embeddings": True}
CASES = {
    "adamw": ADAM,
    "adafactor": {"name": "adafactor", "learning_rate": 0.1},
    "lion": {"name": "lion", "learning_rate": 0.02, "b1": 0.8, "b2": 0.9},
    "muon_original": {"muon_scale": "original", **MUON},
    "muon_match_rms_adamw": MUON,
    "schedule_free": {"name": "schedule_free", "warmup_steps": 4, **ADAM},
}


def _optimizer(section, places=None):
    config = OptimizerSection(**COMMON | section)
    return make_optimizer(config, step_numbers(config, steps=20, tokens_per_step=1, seed=0), places=places)


def _flat(tree):
    return {path_text(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _trained(section, *, steps=problem.STEPS, dtype=np.float64):
    """(parameters, optimizer state) after the steps of the goldens."""
    optimizer = _optimizer(section)
    params = problem.nested({path: jnp.asarray(array, dtype) for path, array in problem.start().items()})
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for number in range(steps):
        gradients = {path: problem.gradient(path, array, number) for path, array in _flat(params).items()}
        gradients = problem.nested({path: jnp.asarray(array, dtype) for path, array in gradients.items()})
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _assert_close(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for path, array in ours.items():
        assert np.linalg.norm(array - expected[path]) <= tolerance * np.linalg.norm(expected[path]), path


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_reference_implementation(case):
    golden = np.load(GOLDENS / f"{case}.npz")
    expected, average = (
        {path.removeprefix(kind): golden[path] for path in golden.files if path.startswith(kind)}
        for kind in ("param/", "average/")
    )
    with jax.enable_x64(True):
        params, state = _trained(CASES[case])
        if average:
            _assert_close(_flat(averaged_params(state, params)), average, 1e-6)
    # Learning rates are float32 numbers, up to 6e-8 off; Newton and Schulz's steps enlarge what is small by up to 500.
    _assert_close(_flat(params), expected, 1e-6)
    wrong = {path: array + 1e-5 for path, array in expected.items()}
    with pytest.raises(AssertionError):
        _assert_close(_flat(params), wrong, 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_reads_all_common_keys_but_those_of_its_row(name):
    read = set()

    class Watched(OptimizerSection):
        def __getattribute__(self, attribute):
            read.add(attribute)
            return super().__getattribute__(attribute)

    config = Watched(name=name, schedule="constant")
    numbers = step_numbers(config, steps=20, tokens_per_step=1, seed=0)
    read.clear()
    optimizer = make_optimizer(config, numbers)
    params = problem.nested({path: jnp.asarray(array) for path, array in problem.start().items()})
    state = jax.eval_shape(optimizer.init, params)
    jax.eval_shape(optimizer.update, params, state, params)
    common = {"b1", "b2", "eps"}
    assert common - read == set(OPTIMIZERS[name].unread)


@pytest.mark.parametrize("schedule", UNREAD_BY_SCHEDULE)
def test_a_schedule_reads_all_keys_but_those_of_its_row(schedule):
    pieces = {"5": 0.3} if schedule == "piecewise" else {}

    def rates(**keys):
        config = OptimizerSection(schedule=schedule, piecewise=pieces, **keys)
        rate = schedule_of(config, step_numbers(config, steps=20, tokens_per_step=1, seed=0))
        return [float(rate(step)) for step in range(20)]

    others = {"final_ratio": 0.5, "wsd_decay_fraction": 0.6, "wsd_decay": "1-sqrt"}
    usual = {"wsd_decay_fraction": 0.3}
    # final + (peak - final) is the peak but for rounding, 1e-7 of it; what is read changes a rate by a hundredth.
    same = {key for key, value in others.items() if np.allclose(rates(**usual | {key: value}), rates(**usual), 1e-6, 0)}
    assert same == set(UNREAD_BY_SCHEDULE[schedule])


def test_every_optimizer_has_a_direction_and_a_reference():
    assert all(hasattr(directions, kind.direction) for kind in OPTIMIZERS.values())
    assert {section.get("name", "adamw") for section in CASES.values()} == set(OPTIMIZERS)


# One that treats matrices otherwise, and one with an average; the others take as long.
@pytest.mark.parametrize("like", others_are_long(OPTIMIZERS, ["muon", "schedule_free"]))
def test_a_new_optimizer_is_one_row_of_the_table(like, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "novel", OPTIMIZERS[like])
    expected, trained = (_trained({"name": name}, steps=1, dtype=np.float32) for name in (like, "novel"))
    assert jax.tree.structure(trained) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, trained, expected)


@pytest.mark.parametrize(
    ("attributes", "keys", "message"),
    [
        ({}, ["model.base_width=64"], "model.base_width=64: not with optimizer.name=novel: "),
        ({"follows_width": True}, ["model.base_width=64"], None),
        (
            {"narrow_moments": False},
            ["optimizer.moment_dtype=bfloat16"],
            "optimizer.moment_dtype=bfloat16: novel ",
        ),
        ({}, ["optimizer.moment_dtype=bfloat16"], None),
        ({}, ["eval.plain=true"], "eval.plain=true: needs optimizer.ema_decay, or optimizer.name=schedule_free"),
        ({"averages_steps": True}, ["eval.plain=true", "optimizer.schedule=constant"], None),
        ({"averages_steps": True}, [], "optimizer.schedule=cosine: optimizer.name=novel averages its steps instead"),
        ({"averages_steps": True}, ["optimizer.schedule=constant", "optimizer.b1=0"], "optimizer.b1=0.0: optimizer.n"),
    ],
)
def test_what_is_refused_follows_from_the_row(attributes, keys, message, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "novel", OptimizerKind(direction="adam", **attributes))
    words = ["optimizer.name=novel", *keys]
    if message is None:
        assert isinstance(parse(words), RunConfig)
        return
    with pytest.raises(ConfigError) as refused:
        parse(words)
    assert str(refused.value).startswith(message)


def test_settings_that_average_are_those_of_the_table(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "novel", OptimizerKind(direction="adam", averages_steps=True))
    expected = "optimizer.ema_decay, or optimizer.name=schedule_free, or optimizer.name=novel"
    assert averaging_settings() == expected
    section = OptimizerSection(name="novel", schedule="constant")
    assert (section.averages, section.average_setting) == (True, "optimizer.name=novel")


def test_adafactor_is_that_of_optax_where_an_array_is_one_matrix():
    """A further reference: with the paper's epsilon, and without the weight decay."""
    rng = np.random.default_rng(0)
    params = {"head": {"kernel": rng.standard_normal((6, 4))}, "final_norm": {"scale": rng.standard_normal(6)}}
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=1)
    section = OptimizerSection(**COMMON | {"name": "adafactor", "learning_rate": 0.1, "weight_decay": 0.0})
    ours = make_optimizer(section, step_numbers(section, steps=9, tokens_per_step=1, seed=0))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        states = ours.init(params), theirs.init(params)
        for _ in range(5):
            gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)
            left, ours_state = ours.update(gradient, states[0], params)
            right, theirs_state = theirs.update(gradient, states[1], params)
            states = ours_state, theirs_state
            _assert_close(_flat(left), _flat(right), 1e-6)
            params = optax.apply_updates(params, left)


def test_adafactor_keeps_a_row_and_a_column_of_every_matrix():
    params = problem.nested({path: jnp.zeros(shape) for path, shape in problem.SHAPES.items()})
    state = scale_by_adafactor(OptimizerSection(name="adafactor")).init(params)
    rows, columns, whole = _flat(state.rows), _flat(state.columns), _flat(state.whole)
    assert rows["run_0/attention/query/kernel"].shape == (2, 6, 1, 1)
    assert columns["run_0/attention/query/kernel"].shape == (2, 1, 2, 4)
    assert rows["run_0/moe/expert_down/kernel"].shape == (2, 3, 10, 1)
    assert whole.keys() == {path for path in problem.SHAPES if not path.endswith(("kernel", "embedding"))}


def test_muon_leaves_embeddings_heads_norms_and_vectors_to_adamw():
    params = problem.nested({path: jnp.zeros(shape) for path, shape in problem.SHAPES.items()})
    params["run_0"]["moe"]["shared_gate"] = {"kernel": jnp.zeros((2, 6, 1))}
    params["run_0"]["attention_pre_norm"]["down"] = jnp.zeros((2, 6, 4))

    def matrices(*left_out):
        config = OptimizerSection(name="muon", muon_except=left_out)
        leaves = jax.tree.leaves_with_path(params)
        return {path_text(path) for path, leaf in leaves if is_muon_matrix(config, path, leaf)}

    kernels = {path for path in problem.SHAPES if path.startswith("run_") and path.endswith("kernel")}
    assert matrices() == kernels
    assert matrices("*/expert_*/kernel") == {path for path in kernels if "expert" not in path}


def test_orthogonalized_matrices_have_singular_values_near_1():
    """After five steps between 0.7 and 1.2, of those that were above 1e-2 of the norm; bfloat16 is some percent off."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((5, size, 8)))[0] for size in (8, 12))
    x = left * np.geomspace(0.02, 0.9, 8) @ right.swapaxes(1, 2)
    for array, tolerance in ((jnp.asarray(x, jnp.float32), 1e-5), (jnp.asarray(x, jnp.bfloat16), 0.05)):
        result = np.asarray(orthogonalized(array, steps=5), np.float64)
        values = np.linalg.svd(result, compute_uv=False)
        assert values.min() > 0.68 - tolerance
        assert values.max() < 1.21 + tolerance
        # The singular vectors stay: between them lies a diagonal.
        inside = left.swapaxes(1, 2) @ result @ right
        off = inside - inside * np.eye(8)
        assert np.abs(off).max() < 10 * tolerance
    tall = orthogonalized(jnp.asarray(x.swapaxes(1, 2), jnp.float32), steps=5)
    np.testing.assert_allclose(tall.mT, orthogonalized(jnp.asarray(x, jnp.float32), steps=5), atol=1e-5)


SPLIT = {
    "adamw": {"name": "adamw"},
    "adamw-bfloat16": {"name": "adamw", "moment_dtype": "bfloat16"},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "muon": {"name": "muon", "muon_dtype": "float32"},
    "schedule_free": {"name": "schedule_free"},
}
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}


def _big(seed, scale=1.0, only=""):
    """Like the problem's parameters, with sizes that the mesh divides, and one run of a single layer."""
    sizes = {2: 4, 3: 2, 6: 8, 10: 16, 7: 12}
    rng = np.random.default_rng(seed)
    shapes = {path: tuple(sizes.get(size, size) for size in shape) for path, shape in problem.SHAPES.items()}
    single = {path: shapes[path][1:] for path in ("run_0/attention/query/kernel", "run_0/moe/expert_down/kernel")}
    shapes |= {path.replace("run_0", "run_1"): (1, *shape) for path, shape in single.items()}
    shapes = {path: shape for path, shape in shapes.items() if only in path}
    return problem.nested({p: scale * rng.standard_normal(shape).astype(np.float32) for p, shape in shapes.items()})


def _split_step(section, mesh):
    optimizer = _optimizer({"learning_rate": 0.01} | section, Places(mesh, RULES))
    # Random bits for every moment of every parameter take long to compile.
    only = "expert" if "moment_dtype" in section else ""
    params, gradients = _big(0, 0.1, only), _big(1, 1.0, only)
    places = tree_shardings(params, mesh)
    placed_state = tree_shardings(jax.eval_shape(optimizer.init, params), mesh)
    init = jax.jit(optimizer.init, out_shardings=placed_state)
    step = jax.jit(optimizer.update, out_shardings=(places, placed_state))
    return step, init, jax.device_put(params, places), jax.device_put(gradients, places)


@pytest.mark.parametrize("case", SPLIT)
def test_eight_devices_equal_one(case):
    updates = []
    for mesh in (make_mesh({}, jax.devices()[:1]), make_mesh(MESH)):
        step, init, params, gradients = _split_step(SPLIT[case], mesh)
        state = init(params)
        for _ in range(2):
            update, state = step(gradients, state, params)
        updates.append((_flat(update), _flat(state)))
    (alone, alone_state), (split, split_state) = updates
    # Sums in another order: last bits of float32, of which Newton and Schulz's steps make up to 500 times as much.
    _assert_close(split, alone, 1e-4 if case == "muon" else 1e-6)
    _assert_close({p: a.astype(np.float32) for p, a in split_state.items()}, alone_state, 1e-6)


@pytest.mark.parametrize("axes", [MESH, {"fsdp": 8}], ids=str)
def test_muon_exchanges_matrices_and_gathers_none(axes):
    """In the compiled step matrices travel all-to-all alone; what is summed over devices are squares for the norms."""
    mesh = make_mesh(axes)
    step, init, params, gradients = _split_step(SPLIT["muon"], mesh)
    abstract = jax.eval_shape(init, params)
    places = tree_shardings(abstract, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    text = step.lower(gradients, state, params).compile().as_text()
    kinds = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
    found = re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text)
    assert {kind for _, kind in found} <= {"all-to-all", "collective-permute", "all-reduce"}
    summed = [shape for shapes, kind in found if kind == "all-reduce" for shape in re.findall(r"\[([\d,]*)\]", shapes)]
    assert max(math.prod(map(int, shape.split(","))) for shape in summed) <= 4 * 2  # layers x experts
    if len(axes) == 1:
        # There and back; none inside of the iteration.
        matrices = sum(path.startswith("run_") and path.endswith("kernel") for path in _flat(params))
        assert sum(kind == "all-to-all" for _, kind in found) == 2 * matrices


def test_rounding_at_random_is_right_in_the_mean():
    x = jnp.asarray([1.0, 1.001, -1.003, 3e-5, 0.0, jnp.inf, jnp.nan])
    keys = jax.random.split(jax.random.key(0), 4096)
    rounded = np.asarray(jax.vmap(lambda key: round_at_random(x, key))(keys), np.float32)
    assert {*np.unique(rounded[:, 1])} == {1.0, 1.0078125}
    # The mean of 4,096 draws of two values 2^-7 apart is off by at most 2^-8 / 64 in one of three cases, here 4 times.
    np.testing.assert_allclose(rounded.mean(0)[:5], x[:5], rtol=4 * 2**-8 / 64)
    assert np.isinf(rounded[:, 5]).all()
    assert np.isnan(rounded[:, 6]).all()


def test_moments_in_bfloat16_move_where_the_nearest_number_would_stand_still():
    """Gradients of 1 after a moment of 0.9 and decay 0.999: the moment grows by 1e-4, a bfloat16 number by 4e-3."""
    section = OptimizerSection(name="lion", b2=0.999, moment_dtype="bfloat16", clip=None)
    optimizer = make_optimizer(section, step_numbers(section, steps=500, tokens_per_step=1, seed=0))
    params = {"head": {"kernel": jnp.zeros((64, 64))}}
    state = optimizer.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert [leaf.dtype for leaf in moments] == [jnp.bfloat16]
    state = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.9) if leaf.ndim == 2 else leaf, state)
    begin = float(jnp.bfloat16(0.9))
    gradient = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(lambda state: optimizer.update(gradient, state, params)[1])
    for _ in range(100):
        state = step(state)
    (moment,) = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state) if leaf.ndim == 2)
    expected = 1 - (1 - begin) * 0.999**100
    assert moment.mean() == pytest.approx(expected, abs=1e-4)  # 4,096 walks of 100 steps below 2e-3 each
    assert begin < expected - 8e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=adam"], "optimizer.name=adam: not known; did you mean 'adamw'?"),
        (["muon_steps=6"], "optimizer.muon_steps=6: only for optimizer.name=muon"),
        (["name=muon", "adafactor_scale=false"], "optimizer.adafactor_scale=false: only for optimizer.name=adafactor"),
        (["name=muon", "muon_scale=keller"], "optimizer.muon_scale=keller: not known"),
        (["name=muon", "muon_dtype=float16"], "optimizer.muon_dtype=float16: not known; did you mean"),
        (["moment_dtype=int8"], "optimizer.moment_dtype=int8: not known; known: bfloat16, float32"),
        (["name=adafactor", "moment_dtype=bfloat16"], "optimizer.moment_dtype=bfloat16: adafactor keeps a few means"),
        (["name=schedule_free"], "optimizer.schedule=cosine: optimizer.name=schedule_free averages its steps instead"),
        (["name=schedule_free", "schedule=constant", "b1=0"], "optimizer.b1=0.0: optimizer.name=schedule_free needs"),
        (["name=schedule_free", "schedule=constant", "ema_decay=0.9"], "has an average of its own; leave one of"),
        (["name=muon", "muon_momentum=1"], "must be at least 0 and below 1"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused_in_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        parse([f"optimizer.{word}" for word in words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_of_muon_that_fits_nothing_is_refused():
    optimizer = _optimizer({"name": "muon", "muon_except": ("*/quary/kernel",)})
    with pytest.raises(ConfigError, match=r"optimizer\.muon_except: the pattern .* did you mean '\*/query/kernel'"):
        optimizer.init(_big(0))


def test_sizes_of_the_problem_are_divided_by_the_mesh():
    places = tree_shardings(_big(0), make_mesh(MESH))
    split = {path_text(path): place for path, place in jax.tree.leaves_with_path(places, is_leaf=_is_place)}
    expert = split["run_0/moe/expert_up/kernel"].spec
    assert (expert[1], expert[3]) == ("expert", "tensor")
    assert math.prod(MESH.values()) == 8


def _is_place(value):
    return isinstance(value, NamedSharding)
