"""What load_run gives: the parameters of any checkpoint, bit for bit, where the caller wants them."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import hybridnorm_jax as hn
from hybridnorm_jax.commands.saved_model import read_directory
from hybridnorm_jax.training import manifest, run_directory


@pytest.fixture
def config(small_config):
    return hn.RunConfig(model=small_config(scheme="span", num_layers=2))


@pytest.fixture
def params(config):
    return jax.jit(hn.Decoder(config.model).init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_is_saved_is_loaded(config, params, tmp_path, tokens):
    path = str(tmp_path / "runs/mine")
    hn.save_run(path, config, params, step=7)
    for given in (path, f"{path}/checkpoints", f"{path}/checkpoints/000007"):
        loaded_config, loaded = hn.load_run(given)
        assert_same(loaded, params)
        assert loaded_config.model == config.model
        assert (loaded_config.run.name, loaded_config.run.dir) == ("mine", str(tmp_path / "runs"))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {SingleDeviceSharding(jax.devices()[0])}
    logits = jax.jit(hn.Decoder(loaded_config.model).apply)({"params": loaded}, tokens)
    np.testing.assert_array_equal(logits, jax.jit(hn.Decoder(config.model).apply)({"params": params}, tokens))
    checkpoints, step = run_directory.newest_step(path)
    assert (str(checkpoints.directory), step) == (f"{path}/checkpoints", 7)
    with pytest.raises(hn.UserError, match="mine: exists already"):
        hn.save_run(path, config, params)


def test_parameters_lie_where_the_caller_wants_them(config, params, tmp_path):
    mesh = hn.make_mesh({"fsdp": 4, "tensor": 2})
    on_mesh = jax.device_put(params, hn.tree_shardings(params, mesh))
    path = str(tmp_path / "run")
    hn.save_run(path, config, on_mesh)  # saved from eight devices

    _, loaded = hn.load_run(path, mesh=mesh)
    assert_same(loaded, params)
    query = loaded["run_0"]["attention"]["query"]["kernel"]
    assert query.sharding == on_mesh["run_0"]["attention"]["query"]["kernel"].sharding
    assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)

    second = SingleDeviceSharding(jax.devices()[1])
    _, loaded = hn.load_run(path, shardings=second)
    assert_same(loaded, params)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {second}

    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    _, loaded = hn.load_run(path, shardings=everywhere)
    assert_same(loaded, params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded))

    with pytest.raises(hn.UserError, match=r"^mesh, shardings: give one of the two$"):
        hn.load_run(path, mesh=mesh, shardings=second)
    with pytest.raises(hn.UserError, match=r"^mesh: lacks the axes replica, .*; hn\.make_mesh makes one"):
        hn.load_run(path, mesh=jax.make_mesh((8,), ("data",)))


def test_the_files_of_a_step_are_verified_once_for_all_that_is_read_of_it(config, params, tmp_path, monkeypatch):
    hn.save_run(str(tmp_path / "run"), config, params)
    looked_at = []
    find_damage = manifest.find_damage
    monkeypatch.setattr(
        manifest, "find_damage", lambda path, **which: looked_at.append(path.name) or find_damage(path, **which)
    )
    read_directory(str(tmp_path / "run"))
    assert looked_at == ["000000"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(hn.UserError, match="nowhere: no such directory"):
        hn.load_run(str(tmp_path / "nowhere"))
    with pytest.raises(hn.UserError, match="no complete checkpoint there"):
        hn.load_run(str(tmp_path))
    with pytest.raises(hn.UserError, match="no complete checkpoint there"):
        run_directory.newest_step(str(tmp_path))


def test_an_object_store_gets_the_configuration_last(config, params, tmp_path, monkeypatch):
    """A directory there cannot be renamed; this one is local, and treated as if it were there."""
    monkeypatch.setattr(run_directory, "is_local", lambda path: False)
    path = str(tmp_path / "bucket/run")
    real, seen = run_directory.Checkpoints.save, []

    def save(checkpoints, *arguments, **keywords):
        seen.append((tmp_path / "bucket/run/config.yaml").exists())
        return real(checkpoints, *arguments, **keywords)

    monkeypatch.setattr(run_directory.Checkpoints, "save", save)
    hn.save_run(path, config, params)
    assert seen == [False]
    assert_same(hn.load_run(path)[1], params)
    with pytest.raises(hn.UserError, match="exists already"):
        hn.save_run(path, config, params)


def test_an_object_store_without_its_extra_says_so(config, params, tmp_path, monkeypatch):
    def missing(self):
        raise ImportError("gcsfs is not installed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(run_directory.epath.Path("gs://bucket")), "exists", missing)
    with pytest.raises(hn.UserError, match=r"^gs://bucket/run: .*pip install 'hybridnorm-jax\[tpu\]'$"):
        hn.save_run("gs://bucket/run", config, params)
    assert list(tmp_path.iterdir()) == []
