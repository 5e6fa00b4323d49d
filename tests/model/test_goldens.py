"""The HybridNorm authors' PyTorch model, reproduced: logits, loss and every parameter's gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

GOLDENS = Path(__file__).parents[1] / "goldens"

# golden file -> our scheme, and whether the embedding is normalized (the authors' Post baseline has that).
CASES = {
    "pre": ("pre", "auto"),
    "pre_qk": ("pre_qk_pre", "auto"),
    "pre_qkv_pre": ("pre_qkv_pre", "auto"),
    "post": ("post", "true"),
    "hybrid": ("hybrid", "auto"),
    "hybrid_star": ("hybrid_star", "auto"),
    "hybrid_qkvc": ("qkvc_post", "auto"),
}


def _case(name, **overrides):
    scheme, embedding_norm = CASES[name]
    sizes = {"d_model": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "vocab_size": 61}
    config = hn.ModelConfig(scheme=scheme, embedding_norm=embedding_norm, **sizes, **overrides)
    with np.load(GOLDENS / f"hybridnorm_official_{name}.npz") as file:
        return config, dict(file)


def _part(golden, prefix):
    return {name: array for name, array in golden.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_the_authors(name):
    config, golden = _case(name)
    params = hn.params_from_olmo(config, _part(golden, "param/"))
    tokens = jnp.asarray(golden["tokens"])

    def loss_fn(params):
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    # As near as the logits it is a mean of; a float32 of its size has steps of 5e-7.
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)

    gradients = {name.removeprefix("grad/"): array for name, array in _part(golden, "grad/").items()}
    expected = hn.params_from_olmo(config, gradients)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    # Norm-wise per parameter: elementwise, entries near zero have no relative accuracy in float32.
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_hybrid_and_its_name_in_the_ablation_are_one_model():
    config, _ = _case("hybrid")
    as_ablation = hn.ModelConfig(scheme="qkv_post", d_model=32, num_layers=3, num_heads=4, mlp_dim=48, vocab_size=61)
    assert config.placements == as_ablation.placements


@pytest.mark.parametrize("file", ["pre", "hybrid", "hybrid_star"])
def test_a_checkpoint_of_another_scheme_is_refused_by_name(file):
    other = {"pre": "hybrid", "hybrid": "pre", "hybrid_star": "hybrid"}[file]
    _, golden = _case(file)
    config, _ = _case(other)
    with pytest.raises(hn.UserError, match=r"transformer\.blocks\.0\."):
        hn.params_from_olmo(config, _part(golden, "param/"))


def test_a_wrong_shape_is_refused_by_name():
    config, golden = _case("pre")
    arrays = _part(golden, "param/")
    arrays["param/transformer.ln_f.weight"] = np.ones(31, np.float32)
    with pytest.raises(hn.UserError, match=r"transformer\.ln_f\.weight: shape \(31,\)"):
        hn.params_from_olmo(config, arrays)
