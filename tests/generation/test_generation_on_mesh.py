"""Generation with parameters on a mesh of eight devices against one device."""

import contextlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.generation import generate as module
from hybridnorm_jax.generation.generate import generate

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
NEW = 12


def prompts(count):
    rng = np.random.default_rng(2)
    return [rng.integers(0, 61, length) for length in rng.integers(1, 20, count)]


def on_mesh(params, **sizes):
    return jax.device_put(params, hn.tree_shardings(params, hn.make_mesh(sizes)))


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.fixture
def calls(monkeypatch):
    """Of every call of `write`: the lowered program, and what it returned."""
    made = []
    original = module.write

    def write(*arguments, **keys):
        made.append((original.lower(*arguments, **keys), original(*arguments, **keys)))
        return made[-1][1]

    monkeypatch.setattr(module, "write", write)
    return made


@pytest.mark.parametrize(
    ("keys", "count", "mesh", "share"),
    [
        ({"scheme": "hybrid_star"}, 3, MESH, (1, 1)),  # a batch is split into four
        ({"num_kv_heads": 1, "vocab_size": 64}, 4, MESH, (1, 1)),  # both devices of `tensor` hold the one head
        pytest.param(EXPERTS, 8, MESH, (2, 1), marks=pytest.mark.long),
        (EXPERTS, 2, {"data": 2, "expert": 2, "context": 2}, (1, 2)),
    ],
    ids=["a row is added", "one kv head", "experts", "experts on devices of their own"],
)
def test_eight_devices_write_what_one_writes(keys, count, mesh, share, small_config, random_params, calls):
    config = small_config(num_layers=2, **keys)
    params = random_params(config)
    alone = generate(config, params, prompts(count), max_new_tokens=NEW)
    together = generate(config, on_mesh(params, **mesh), prompts(count), max_new_tokens=NEW)
    assert lists(together) == lists(alone)
    _, (writing, _, _) = calls[-1]
    for cached in jax.tree.leaves(writing.cache):
        assert cached.sharding.shard_shape(cached.shape)[:2] == share


@pytest.mark.parametrize("is_in_force", [False, True])
@pytest.mark.parametrize("names", [("x",), ("replica", "data", "fsdp", "context", "expert", "tensor")], ids=len)
def test_a_mesh_may_have_explicit_axes(names, is_in_force, small_config, random_params):
    """As those of jax.make_mesh are: with other axes than ours, and with ours."""
    config = small_config(num_layers=1)
    params = random_params(config)
    alone = generate(config, params, prompts(2), max_new_tokens=3)
    shape = (8,) if len(names) == 1 else (1, 2, 2, 1, 1, 2)
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names))
    shardings = NamedSharding(mesh, PartitionSpec()) if len(names) == 1 else hn.tree_shardings(params, mesh)
    with jax.set_mesh(mesh) if is_in_force else contextlib.nullcontext():
        together = generate(config, jax.device_put(params, shardings), prompts(2), max_new_tokens=3)
    assert lists(together) == lists(alone)


def test_rows_that_are_added_do_not_keep_the_others_waiting(small_config, random_params, calls):
    """Every token ends a row, so nothing is written after the first ones, and not after one row that is real."""
    config = small_config(num_layers=2)
    rows = generate(config, on_mesh(random_params(config), **MESH), prompts(1), max_new_tokens=NEW, stop_ids=range(61))
    assert [len(row) for row in rows] == [1]
    assert not calls
    (text,) = lists(generate(config, on_mesh(random_params(config), **MESH), prompts(1), max_new_tokens=NEW))
    end = next(token for place, token in enumerate(text) if place and token not in text[:place])
    ended = generate(config, on_mesh(random_params(config), **MESH), prompts(1), max_new_tokens=NEW, stop_ids=[end])
    assert lists(ended) == [text[: text.index(end) + 1]]
    _, (_, _, written) = calls[-1]
    assert int(written) == text.index(end)


def test_no_device_holds_or_fetches_the_whole_cache(small_config, random_params, calls):
    config = small_config(num_layers=2)
    generate(config, on_mesh(random_params(config), **MESH), prompts(7), max_new_tokens=NEW)
    lowered, (writing, _, _) = calls[-1]
    (cached, *_) = jax.tree.leaves(writing.cache)
    text = lowered.compile().as_text()
    rows, heads, width, slots = cached.shape
    assert (rows, heads) == (8, 2)
    shapes = {tuple(map(int, each)) for each in re.findall(rf"f32\[(\d+),(\d+),{width},{slots}\]", text)}
    assert shapes == {(2, 1)}
