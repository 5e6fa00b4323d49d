"""What a layer draws depends on its number and on nothing else of the scheme: its parameters, and its dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import SCHEMES_WITH_EACH_PLACE, others_are_long
from flax import linen as nn

import hybridnorm_jax as hn
from hybridnorm_jax.model.block import Dropout
from hybridnorm_jax.model.watched_streams import STREAM

LAYERS = 8  # mix_ln then has two layers of its own at the start, hybrid_star one
SMALL = {"d_model": 8, "num_layers": LAYERS, "num_heads": 2, "mlp_dim": 16, "vocab_size": 11}
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


def _config(scheme, **keys):
    return hn.ModelConfig(scheme=scheme, **(SMALL | keys))


def _groupings():
    """One scheme of each way in which schemes group their layers into runs."""
    found = {}
    for name in hn.SCHEMES:
        grouping = tuple(run.length for run in _config(name).runs)
        found.setdefault(grouping, name)
    return list(found.values())


@functools.cache
def _init(config, seed=0):
    init = jax.jit(hn.Decoder(config).init)
    return init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def _by_layer(config, tree, is_kept):
    """Leaves of the tree by (absolute layer, path inside the block), and those outside the blocks by path."""
    found = {}
    starts = [run.start for run in config.runs]
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        run, _, inside = name.partition("/")
        if not is_kept(name):
            continue
        if not run.startswith("run_"):
            found[name] = np.asarray(leaf)
            continue
        start = starts[int(run.removeprefix("run_"))]
        found |= {(start + index, inside): np.asarray(layer) for index, layer in enumerate(leaf)}
    return found


def _matrices(config, params):
    return _by_layer(config, params, lambda name: name.endswith(("kernel", "embedding")))


def _assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for where, matrix in expected.items():
        np.testing.assert_array_equal(ours[where], matrix, err_msg=str(where))


def test_there_are_several_groupings():
    assert _groupings() == ["pre", "hybrid_star", "mix_ln", "mix_ln_50"]


def _assert_same_matrices_as_pre(scheme):
    pre = _config("pre", initializer="normal")
    expected = _matrices(pre, _init(pre))
    config = _config(scheme, initializer="normal")
    _assert_equal(_matrices(config, _init(config)), expected)
    assert len(expected) == LAYERS * len(MATRICES) + 2


@pytest.mark.parametrize("scheme", others_are_long(_groupings(), ["pre", "hybrid_star", "mix_ln"]))
def test_schemes_of_every_grouping_start_from_the_same_matrices(scheme):
    _assert_same_matrices_as_pre(scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", hn.SCHEMES)
def test_all_schemes_start_from_the_same_matrices(scheme):
    _assert_same_matrices_as_pre(scheme)


@pytest.mark.parametrize("scheme", others_are_long(hn.SCHEMES, SCHEMES_WITH_EACH_PLACE))
def test_all_schemes_have_the_same_matrices_in_the_same_places(scheme):
    """With the groupings above: no scheme has a matrix whose key depends on anything but its layer and its path."""
    assert _matrix_paths(scheme) == _matrix_paths("pre")


@functools.cache
def _matrix_paths(scheme):
    """Paths inside a block, from the shapes alone."""
    shapes = jax.tree.leaves_with_path(hn.model.abstract_params.abstract_params(_config(scheme)))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in shapes}
    matrices = {name for name in names if name.endswith(("kernel", "embedding"))}
    return {name.partition("/")[2] if name.startswith("run_") else name for name in matrices}


@pytest.mark.parametrize("scheme", others_are_long(["mix_ln", "hybrid_star", "b2t"], ["hybrid_star", "b2t"]))
def test_with_its_own_initializer_a_scheme_has_the_same_matrices_times_a_factor(scheme):
    normal = _config("pre", initializer="normal")
    config = _config(scheme)
    own = _matrices(config, _init(config))
    for where, matrix in _matrices(normal, _init(normal)).items():
        ratio = own[where] / matrix
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5, err_msg=str(where))


def test_the_matrices_of_two_layers_and_of_two_places_are_not_the_same():
    params = _matrices(_config("pre"), _init(_config("pre")))
    square = [matrix.ravel()[:16].tobytes() for matrix in params.values()]
    assert len(set(square)) == len(square)


UNROLLED = pytest.param({"remat": "dots", "scan_unroll": 8}, marks=pytest.mark.long)


@pytest.mark.parametrize("keys", [{"scan_unroll": 3}, {"remat": "full"}, UNROLLED])
def test_loops_and_rematerialization_change_no_number(keys):
    config = _config("hybrid_star")
    changed = dataclasses.replace(config, **keys)
    jax.tree.map(np.testing.assert_array_equal, _init(changed), _init(config))


def test_two_decoders_in_one_module_start_from_different_numbers():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            first, second = (hn.Decoder(_config("pre", num_layers=1), name=name)(tokens) for name in ("a", "b"))
            return first + second

    @jax.jit
    def draw(key):
        params = Pair().init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return [params[name]["run_0"]["attention"]["query"]["kernel"] for name in ("a", "b")]

    a, b = draw(jax.random.key(0))
    assert not np.array_equal(a, b)


@functools.cache
def _dropped(scheme, **keys):
    """What a pass with half of everything dropped sows: what every Dropout returns, and the stream."""
    config = _config(scheme, dropout=0.5, initializer="normal", **keys)
    variables = {"params": _init(dataclasses.replace(config, dropout=0.0))}
    tokens = jnp.arange(10).reshape(2, 5)

    @jax.jit
    def apply(variables):
        return hn.Decoder(config).apply(
            variables,
            tokens,
            deterministic=False,
            rngs={"dropout": jax.random.key(7)},
            capture_intermediates=lambda module, _: isinstance(module, Dropout),
            mutable=["intermediates", STREAM],
        )[1]

    return config, apply(variables)


def _masks(scheme, **keys):
    """Which elements are kept, by (absolute layer, path)."""
    config, sown = _dropped(scheme, **keys)
    # Flax captures what Dropout returns, and what the Dropout that it extends returns, which has the same mask.
    outputs = _by_layer(config, sown["intermediates"], lambda name: name.endswith("__call__/0"))
    return {where: out != 0 for where, out in outputs.items()}


def test_every_layer_and_every_branch_has_a_dropout_mask_of_its_own():
    masks = _masks("pre")
    assert len(masks) == 2 * LAYERS + 1
    for where, mask in masks.items():
        # 80 draws of probability one half: five standard deviations.
        assert abs(mask.mean() - 0.5) < 5 * 0.5 / 80**0.5, where
    assert len({mask.tobytes() for mask in masks.values()}) == len(masks)


@pytest.mark.parametrize("scheme", others_are_long(["hybrid_star", "mix_ln"], ["mix_ln"]))
def test_a_layers_dropout_mask_does_not_depend_on_the_scheme(scheme):
    _assert_equal(_masks(scheme), _masks("pre"))


def test_loops_and_rematerialization_change_no_dropout_mask():
    _assert_equal(_masks("hybrid_star", remat="full", scan_unroll=3), _masks("pre"))


def test_the_embedding_is_dropped():
    _, sown = _dropped("pre")
    embedded = np.asarray(sown[STREAM]["value"][0])
    assert abs((embedded == 0).mean() - 0.5) < 5 * 0.5 / 80**0.5
    np.testing.assert_array_equal(embedded, sown["intermediates"]["dropout"]["__call__"][0])
