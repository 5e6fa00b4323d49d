"""Other people's Pre-LN models, Linen and NNX, converted by a layout of a dozen lines."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign import foreign_gpt, foreign_gpt_nnx, foreign_vit

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import (
    LayoutError,
    NormBias,
    NormScale,
    Reads,
    ResidualLayout,
    Writes,
    compress,
    decompress,
    fold_affine,
    recenter,
)

WIDTH = 20
EPS = 1e-6  # what nn.LayerNorm and nnx.LayerNorm add by default
PADDED = 24  # WIDTH - 1, filled up to a multiple of 8
FORMS = ("rms", "crms", "crms_padded")
DOCUMENT = Path(__file__).parents[2] / "docs" / "foreign_models.md"

GPT_RULES = {
    "{tokens,positions}/embedding": Writes(),
    "block_{i}/norm_{n}/scale": NormScale(),
    "block_{i}/norm_{n}/bias": NormBias(),
    "block_{i}/attention/{query,key,value}/kernel": Reads("block_{i}/norm_1"),
    "block_{i}/attention/out/{kernel,bias}": Writes(),
    "block_{i}/up/kernel": Reads("block_{i}/norm_2"),
    "block_{i}/down/{kernel,bias}": Writes(),
    "final_norm/scale": NormScale(),
    "final_norm/bias": NormBias(),
    "head/kernel": Reads("final_norm"),
}
GPT_LAYOUT = ResidualLayout(GPT_RULES)

VIT_LAYOUT = ResidualLayout(
    {
        "patches/{kernel,bias}": Writes(),
        "{class_token,positions}": Writes(),
        "encoder_{i}/norm_{n}/scale": NormScale(),
        "encoder_{i}/norm_{n}/bias": NormBias(),
        "encoder_{i}/attention/qkv/kernel": Reads("encoder_{i}/norm_1"),
        "encoder_{i}/attention/projection/{kernel,bias}": Writes(),
        "encoder_{i}/up/kernel": Reads("encoder_{i}/norm_2"),
        "encoder_{i}/down/{kernel,bias}": Writes(),
        "final_norm/scale": NormScale(),
        "final_norm/bias": NormBias(),
        "head/kernel": Reads("final_norm"),
    }
)

NNX_LAYOUT = ResidualLayout(
    {
        "{tokens,positions}/embedding": Writes(),
        "blocks/{i}/norm_{n}/scale": NormScale(),
        "blocks/{i}/norm_{n}/bias": NormBias(),
        "blocks/{i}/attention/{query,key,value}/kernel": Reads("blocks/{i}/norm_1"),
        "blocks/{i}/attention/out/{kernel,bias}": Writes(),
        "blocks/{i}/up/kernel": Reads("blocks/{i}/norm_2"),
        "blocks/{i}/down/{kernel,bias}": Writes(),
        "final_norm/scale": NormScale(),
        "final_norm/bias": NormBias(),
        "head/kernel": Reads("final_norm"),
    }
)


def _linen_changes(form):
    """Constructor arguments of a foreign Linen model in one form."""
    norm = partial(hn.Norm, epsilon=EPS, use_scale=False)
    return {
        "pre_ln": {},
        "rms": {"norm": partial(norm, kind="rmsnorm")},
        "crms": {"norm": partial(norm, kind="crmsnorm"), "width": WIDTH - 1},
        "crms_padded": {"norm": partial(norm, kind="crmsnorm", width=WIDTH), "width": PADDED},
    }[form]


def _linen(model):
    def apply(form, params, inputs):
        return model(**_linen_changes(form)).apply({"params": params}, inputs)

    def shapes(inputs):
        return jax.eval_shape(lambda: model().init(jax.random.key(0), inputs))["params"]

    return jax.jit(apply, static_argnums=0), shapes


def _nnx_changes(form):
    """Constructor arguments of the foreign NNX model in one form."""

    def rms(width, **made):
        return nnx.RMSNorm(width, epsilon=EPS, use_scale=False, **made)

    def crms(width, **made):
        return partial(hn.crms_norm, eps=EPS, width=WIDTH)

    return {
        "pre_ln": {},
        "rms": {"norm": rms},
        "crms": {"norm": crms, "width": WIDTH - 1},
        "crms_padded": {"norm": crms, "width": PADDED},
    }[form]


def _shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


@partial(jax.jit, static_argnums=0)
def _nnx_apply(form, params, inputs):
    # nnx.Embed casts to the dtype it was made with, whatever is put into it.
    changes = _nnx_changes(form) | {"param_dtype": jnp.float64}
    graph, state = nnx.split(nnx.eval_shape(lambda: foreign_gpt_nnx.GPT(**changes, rngs=nnx.Rngs(0))))
    # replace_by_pure_dict keeps what the dict does not have: nothing may be missing.
    assert _shapes(nnx.to_pure_dict(state)) == _shapes(params)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(inputs)


def _nnx_shapes(inputs):
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: foreign_gpt_nnx.GPT(rngs=nnx.Rngs(0))), nnx.Param))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model under test: apply(form, params, inputs), the Pre-LN tree's shapes, its layout and how it draws inputs."""

    apply: Callable
    shapes: Callable
    layout: ResidualLayout
    inputs: Callable


def _tokens(rng):
    return rng.integers(0, 29, (2, 11)).astype(np.int32)


def _images(rng):
    return rng.standard_normal((3, 12, 8, 3))


FOREIGN = {
    "gpt": Foreign(*_linen(foreign_gpt.GPT), GPT_LAYOUT, _tokens),
    "vit": Foreign(*_linen(foreign_vit.ViT), VIT_LAYOUT, _images),
    "nnx": Foreign(_nnx_apply, _nnx_shapes, NNX_LAYOUT, _tokens),
}


@pytest.fixture(params=FOREIGN)
def foreign(request):
    """One foreign model, with float64 switched on."""
    with jax.enable_x64(True):
        yield FOREIGN[request.param]


def _draw(foreign):
    """(params, inputs) in float64, every leaf drawn at random: scales around 1, all others around 0."""
    rng = np.random.default_rng(0)
    inputs = foreign.inputs(rng)

    def leaf(path, shape):
        return float(path[-1].key == "scale") + 0.3 * rng.standard_normal(shape.shape)

    return jax.tree.map_with_path(leaf, foreign.shapes(inputs)), inputs


def _convert(params, layout, form):
    centred = recenter(fold_affine(params, layout), layout)
    return centred if form == "rms" else compress(centred, layout, pad_to=8 if form == "crms_padded" else 1)


# One program for each model and form, instead of one for each operation.
_converted = jax.jit(_convert, static_argnums=(1, 2))


def _error(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def _gpt_params():
    return jax.tree.map(np.float32, _draw(FOREIGN["gpt"])[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_converted_model_computes_what_the_original_computes(foreign, form):
    params, inputs = _draw(foreign)
    converted = _converted(params, foreign.layout, form)
    assert not [path for path in flatten_dict(converted) if "norm" in str(path[-2:])]
    original = foreign.apply("pre_ln", params, inputs)
    assert original.dtype == np.float64
    # Rounding of float64 through three blocks; a wrong or missing step shows at 1e-2 (the test below).
    assert _error(foreign.apply(form, converted, inputs), original) < 1e-10


def test_every_step_is_needed(foreign):
    (params, inputs), layout = _draw(foreign), foreign.layout
    original = foreign.apply("pre_ln", params, inputs)
    folded = fold_affine(params, layout)
    scales = {path: np.ones_like(leaf) if path[-1] == "scale" else leaf for path, leaf in flatten_dict(params).items()}
    faulty = {
        "not recentred": foreign.apply("rms", folded, inputs),
        "scales not folded": foreign.apply("rms", _converted(unflatten_dict(scales), layout, "rms"), inputs),
        "not recentred, compressed": foreign.apply("crms", compress(folded, layout), inputs),
    }
    for fault, outputs in faulty.items():
        assert _error(outputs, original) > 1e-2, fault


@pytest.mark.parametrize(("foreign", "form"), diagonal(FOREIGN, FORMS, apart=3), indirect=["foreign"])
def test_the_gradient_of_the_original_parameters_is_the_same(foreign, form):
    params, inputs = _draw(foreign)

    def loss(outputs):
        return jnp.square(jnp.sin(outputs)).mean()

    def through(form, params):
        tree = params if form == "pre_ln" else _convert(params, foreign.layout, form)
        return loss(foreign.apply(form, tree, inputs))

    expected = jax.jit(jax.grad(partial(through, "pre_ln")))(params)
    ours = jax.jit(jax.grad(partial(through, form)))(params)
    # Against the norm of the whole gradient: that of a key bias is zero, as softmax does not see it.
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(expected)))
    assert whole > 1e-3
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(left - right) < 1e-10 * whole, jax.tree_util.keystr(path)


@pytest.mark.parametrize("pad_to", [1, 8])
def test_decompress_then_compress_is_the_identity_bit_for_bit(foreign, pad_to):
    params, inputs = _draw(foreign)
    form = "crms" if pad_to == 1 else "crms_padded"
    small = _convert(params, foreign.layout, form)
    whole = decompress(small, foreign.layout, width=WIDTH)
    again = compress(whole, foreign.layout, pad_to=pad_to)
    for path, leaf in flatten_dict(small).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten_dict(again)[path]).tobytes(), path
    assert _error(foreign.apply("rms", whole, inputs), foreign.apply("pre_ln", params, inputs)) < 1e-10


def test_the_transforms_under_jit_give_what_they_give_without(foreign):
    params, _ = _draw(foreign)

    @partial(jax.jit, static_argnums=1)
    def there_and_back(params, layout):
        small = _convert(params, layout, "crms_padded")
        return small, decompress(small, layout, width=WIDTH)

    small = _convert(params, foreign.layout, "crms_padded")
    without = small, decompress(small, foreign.layout, width=WIDTH)
    compiled = there_and_back(params, foreign.layout)
    for left, right in zip(jax.tree.leaves(compiled), jax.tree.leaves(without), strict=True):
        # XLA may add in another order: a few roundings of numbers below 10.
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-13)


def _with_leaf(path, leaf):
    return unflatten_dict(flatten_dict(_gpt_params()) | {tuple(path.split("/")): leaf})


def _without_leaves(pattern):
    flat = flatten_dict(_gpt_params())
    return unflatten_dict({path: leaf for path, leaf in flat.items() if not re.fullmatch(pattern, "/".join(path))})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"tokens/embedding": None}, r"^positions/embedding: no rule of the layout names this leaf$"),
        ({"blocks_{i}/gate/kernel": Writes()}, r"^blocks_\{i\}/gate/kernel: this rule of the layout names no leaf"),
        ({"head/{kernel,bias}": Writes()}, r"^head/(kernel|bias): two rules of the layout name this leaf: head/kernel"),
        ({"head/kernel": Reads("final_nrom")}, r"^head/kernel: reads final_nrom, without scale or bias in the tree"),
        ({"head/kernel": Reads(None)}, r"^final_norm/\w+: no rule of the layout says who reads final_norm$"),
        ({"head/kernel": Reads("final_norm", axis=1)}, r"^head/kernel: \(20, 29\) has 29 there, but the stream is 20"),
        ({"head/kernel": Reads("final_norm", axis=2)}, r"^head/kernel: has 2 axes, but the layout says axis 2$"),
        ({"block_{i}/up/kernel": Reads("block_{j}/norm_2")}, r"^block_\d/up/kernel: block_\{j\}/norm_2 uses a name"),
        ({"head/kernel": Reads("final_norm", bias="head/offset")}, r"^head/kernel: its bias head/offset is no leaf"),
        ({"head/kernel": "final_norm"}, r"^head/kernel: 'final_norm' is no role; Writes, "),
        ({"block_{i,}/up/{}": Writes()}, r"^block_\{i,\}/up/\{\}: \{\} must hold a name"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_rule_or_the_leaf(rules, message):
    if None in rules.values():  # a narrower rule in place of the first one
        rules = {next(iter(rules)): Writes()} | {key: GPT_RULES[key] for key in list(GPT_RULES)[1:]}
    else:
        rules = GPT_RULES | rules
    with pytest.raises(LayoutError, match=message) as caught:
        fold_affine(_gpt_params(), ResidualLayout(rules))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            lambda: _with_leaf("extra/kernel", np.ones((3, 3), np.float32)),
            r"^extra/kernel: no rule of the layout names this leaf$",
        ),
        (lambda: _without_leaves("block_./up/kernel"), r"^block_\{i\}/up/kernel: this rule of the layout names no"),
        (lambda: _without_leaves("head/bias"), r"^head/kernel: reads a norm that has a bias, but has none itself: "),
        (
            lambda: _with_leaf("block_2/down/bias", np.ones(21, np.float32)),
            r"^block_2/down/bias: \(21,\) has 21 there, but the stream is 20",
        ),
        (
            lambda: _with_leaf("block_1/norm_2/scale", np.ones(19, np.float32)),
            r"^block_1/norm_2/scale: \(19,\) has 19 there, but",
        ),
        (
            lambda: _with_leaf("head/bias", np.ones(30, np.float32)),
            r"^head/bias: has shape \(30,\), but head/kernel gives \(29,\)",
        ),
        (lambda: _with_leaf("head/kernel", np.ones((20, 29), int)), r"^head/kernel: int64, but readers and writers"),
        (
            lambda: _with_leaf("extra/kernel", np.ones((3, 3))),
            r"^extra/kernel: float64, which JAX keeps with JAX_ENABLE_X64",
        ),
        (lambda: _with_leaf("head/kernel", 1.0), r"^head/kernel: a float, but every leaf must be an array"),
        (lambda: {"a": {1: np.ones(3, np.float32), "1": np.ones(3, np.float32)}}, r"^a/1: two leaves of the tree have"),
        (lambda: nnx.State({"kernel": np.ones(3)}), r"^params: nested dicts of arrays are needed, not State$"),
        (lambda: [np.ones(3)], r"^params: nested dicts of arrays are needed, not list$"),
        (lambda: np.ones(3), r"^params: nested dicts of arrays are needed, not ndarray$"),
    ],
)
def test_a_tree_that_does_not_fit_names_the_leaf(tree, message):
    with pytest.raises(LayoutError, match=message) as caught:
        fold_affine(tree(), GPT_LAYOUT)
    assert "\n" not in str(caught.value)


def test_what_comes_too_early_or_asks_too_much_is_refused():
    params = _gpt_params()
    with pytest.raises(LayoutError, match=r"scale: a norm's scale or bias is still there; fold_affine comes before"):
        compress(params, GPT_LAYOUT)
    folded = fold_affine(params, GPT_LAYOUT)
    with pytest.raises(LayoutError, match=r"^pad_to=0: must be at least 1$"):
        compress(folded, GPT_LAYOUT, pad_to=0)
    with pytest.raises(LayoutError, match=r"^width=21: the tree stores 19 channels, so it can be at most one more$"):
        decompress(compress(folded, GPT_LAYOUT), GPT_LAYOUT, width=21)


def _run_document():
    """Execute the document's python blocks in order; returns (their names, [(text shown, text printed)])."""
    names, outputs = {}, []
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", DOCUMENT.read_text(), re.M | re.S)
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(DOCUMENT), "exec"), names)
        outputs.append((shown, printed.getvalue()))
    return names, outputs


@pytest.mark.long
def test_the_document_prints_what_it_says_and_shows_the_layouts_tested_here():
    (names, outputs), text = _run_document(), DOCUMENT.read_text()
    assert len(outputs) == text.count("```python"), "a block of the document was not found"
    assert sum(bool(shown) for shown, _ in outputs) == text.count("```text")
    for shown, printed in outputs:
        assert printed == shown
    assert (names["gpt_layout"], names["vit_layout"], names["nnx_layout"]) == (GPT_LAYOUT, VIT_LAYOUT, NNX_LAYOUT)
