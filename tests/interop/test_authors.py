"""Models of the authors of placements, read by the names of their tensors: logits, loss and every gradient."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from authors_models import CASES, case, part
from covering import others_are_long

import hybridnorm_jax as hn


@pytest.fixture(autouse=True)
def scaled_residual():
    """ResiDual with the factors of the golden residual_scaled: a scheme of one's own."""
    ends = hn.SideStream(start_scale=0.5, main_scale=0.7, side_norm_eps=1e-7)
    sublayer = hn.SublayerPlacement(post=True, side="written", side_scale=0.5)
    enter = hn.scheme("residual_scaled", final_norm=False, side_stream=ends)
    enter(lambda layer, num_layers: hn.BlockPlacement(sublayer, sublayer))


def logits_of(config, params, tokens):
    return jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_authors_is_reproduced(name):
    project, config, golden = case(name)
    params = hn.params_from_authors(project, config, part(golden, "param/"))
    logits = np.asarray(logits_of(config, params, golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    largest = logits[:, :-1].max(-1, keepdims=True)
    log_probs = logits[:, :-1] - largest - np.log(np.exp(logits[:, :-1] - largest).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_probs, golden["tokens"][:, 1:, None], -1).mean()
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)


# A gradient takes three times as long to compile as the logits. One of each kind of model: of several groups of layers,
# with scales, with two streams, around the block, on a sphere, with branches that grow.
WITH_GRADIENTS = ("mix_ln", "normformer_resid", "siamese_hybrid_pre", "b2t", "ngpt_rope", "simplegpt", "prores_post")


@pytest.mark.parametrize("name", others_are_long(CASES, WITH_GRADIENTS))
def test_gradients_are_those_of_the_authors(name):
    project, config, golden = case(name)
    params = hn.params_from_authors(project, config, part(golden, "param/"))
    tokens = jnp.asarray(golden["tokens"])

    def loss_fn(params):
        logits = logits_of(config, params, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    expected = hn.params_from_authors(project, config, part(golden, "grad/"))
    if config.attention_bias:
        # A bias of the keys moves all logits of a query alike: its gradient is zero, and theirs is rounding.
        assert np.abs(grads["run_0"]["attention"]["key"].pop("bias")).max() < 1e-6
        del expected["run_0"]["attention"]["key"]["bias"]
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        # Norm-wise per parameter: elementwise, entries near zero have no relative accuracy in float32.
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("b2t", {"scheme": "post"}),
        ("layernorm_scaling", {"scheme": "pre"}),
        ("deepnorm_llama", {"scheme": "post_final_norm"}),
        ("prores_sandwich", {"ramp_at": 100}),
        ("torchscale_deepnorm", {"scheme": "post"}),
    ],
)
def test_names_do_not_tell_these_models_apart(name, changes):
    """They are read alike, and are other models."""
    project, config, golden = case(name, **changes)
    params = hn.params_from_authors(project, config, part(golden, "param/"))
    assert np.abs(logits_of(config, params, golden["tokens"]) - golden["logits"]).max() > 0.1


def test_the_page_lists_the_projects_and_their_schemes():
    page = (Path(__file__).parents[2] / "docs" / "authors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert {name: source for name, source, _ in rows} == {name: each.source for name, each in hn.PROJECTS.items()}
    for project, _, schemes in rows:
        compared = {case(name)[1].scheme for name in CASES if CASES[name][0] == project}
        assert set(re.findall(r"`(\w+)`", schemes)) == compared - {"residual_scaled"}
