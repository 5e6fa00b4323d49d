"""Which parameters decay: what a line of decay_mask names, and no learned scale."""

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.decay import decay_mask
from hybridnorm_jax.training.optimizers.schedules import step_numbers

SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61}
EVERYTHING = OptimizerSection(decay_embeddings=True, decay_norms_and_biases=True)


def _mask(optimizer=EVERYTHING, **keys):
    """Whether each leaf decays, by its path."""
    mask = decay_mask(optimizer, abstract_params(hn.ModelConfig(**SIZES | keys)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): decays for path, decays in _leaves(mask)}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _paths(mask, *, decays):
    return {path for path, found in mask.items() if found is decays}


def test_what_decays():
    keys = {"scheme": "hybrid_star", "attention_bias": True}
    mask = _mask(OptimizerSection(), **keys)
    assert mask["run_1/attention/query/kernel"]
    assert mask["run_1/attention/query/bias"]
    assert not mask["token_embedding/embedding"]
    assert mask["final_norm/scale"]
    mask = _mask(OptimizerSection(decay_norms_and_biases=False, decay_embeddings=True), **keys)
    assert mask["run_1/attention/query/kernel"]
    assert not mask["run_1/attention/query/bias"]
    assert mask["token_embedding/embedding"]
    assert not mask["final_norm/scale"]


@pytest.mark.parametrize(
    ("keys", "never"),
    [
        ({"scheme": "pre", "layer_scale": True}, {"attention_layer_scale", "feed_forward_layer_scale"}),
        ({"scheme": "hybrid_rezero"}, {"attention_layer_scale"}),
        ({"scheme": "hybrid_skipinit"}, {"attention_layer_scale", "feed_forward_layer_scale"}),
        ({"scheme": "normformer_residual"}, {"attention/head_scales", "feed_forward_residual_vector"}),
        ({"scheme": "siamese_hybrid_pre"}, {"attention_own_vector"}),
    ],
    ids=lambda value: value.get("scheme") if isinstance(value, dict) else "",
)
def test_learned_scales_in_blocks_never_decay(keys, never):
    """They are stacked by layer: a number of a block has one axis, a vector two, as the bias of a projection has."""
    mask = _mask(attention_bias=True, mlp_bias=True, **keys)
    assert _paths(mask, decays=False) == {f"run_0/{path}/scale" for path in never}


@pytest.mark.parametrize(
    ("kind", "never"), [("dyt", {"alpha"}), ("derf", {"alpha", "shift"}), ("bhyt", {"lam"}), ("gated", set())]
)
def test_numbers_of_norms_never_decay_and_their_scales_do(kind, never):
    mask = _mask(scheme="pre", norm=kind, norm_bias=True, learned_embedding_scale=True)
    norms = ("run_0/attention_pre_norm", "run_0/feed_forward_pre_norm", "final_norm")
    assert _paths(mask, decays=False) == {f"{norm}/{name}" for norm in norms for name in never} | {
        "embedding_scale/scale"
    }


def test_matrices_of_norms_decay_as_their_scales_do():
    mask = _mask(OptimizerSection(decay_norms_and_biases=False), scheme="pre", norm="gated")
    of_norms = {path: decays for path, decays in mask.items() if "norm" in path}
    assert {path.rpartition("/")[2] for path in of_norms} == {"scale", "down", "up"}
    assert not any(of_norms.values())
    assert mask["run_0/feed_forward/down/kernel"]


def test_a_vector_of_a_users_norm_does_not_decay():
    @hn.norm_kind("leaning", parameters=[hn.NormParameter("lean", ("width",)), hn.NormParameter("turn", (4, "width"))])
    def leaning(x, lean, turn):
        return x * lean + x * turn.sum(0)

    try:
        mask = _mask(scheme="pre", norm="leaning")
    finally:
        del hn.NORM_KINDS["leaning"]
    assert not mask["run_0/attention_pre_norm/lean"]
    assert not mask["final_norm/lean"]
    assert mask["run_0/attention_pre_norm/turn"]
    assert mask["final_norm/turn"]


def test_a_step_without_gradient_moves_what_decays_alone():
    config = hn.ModelConfig(scheme="normformer_residual", norm="dyt", learned_embedding_scale=True, **SIZES)
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), np.zeros((1, 2), int))["params"]
    optimizer = OptimizerSection(schedule="constant", learning_rate=0.5, weight_decay=0.5)
    transform = make_optimizer(optimizer, step_numbers(optimizer, steps=1, tokens_per_step=1, seed=0))
    gradients = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda params: transform.update(gradients, transform.init(params), params)[0])(params)
    mask = dict(_leaves(decay_mask(optimizer, params)))
    assert set(mask.values()) == {False, True}
    for (path, update), (_, leaf) in zip(_leaves(updates), _leaves(params), strict=True):
        np.testing.assert_allclose(update, -0.25 * leaf if mask[path] else np.zeros_like(leaf), rtol=1e-6)
