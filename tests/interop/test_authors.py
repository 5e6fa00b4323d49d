"""Models of the authors of placements, read by the names of their tensors: logits, loss and every gradient."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop.authors.projects import PROJECTS, params_from_authors

GOLDENS = Path(__file__).parents[1] / "goldens" / "placements"
SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "vocab_size": 61}
TORCHSCALE = {"max_positions": 38}
FAIRSEQ = {"max_positions": 64, "embedding_scale": math.sqrt(32)}
SIAMESE = {"num_kv_heads": 2}
# golden -> the project, and what of the model it does not say. `deepnorm_pre` is what a flag alone makes of torchscale.
CASES = {
    "torchscale_subln": ("torchscale", {"scheme": "sub_ln", **TORCHSCALE}),
    "torchscale_deepnorm": ("torchscale", {"scheme": "deepnorm", **TORCHSCALE}),
    "torchscale_deepnorm_default_config": ("torchscale", {"scheme": "deepnorm_pre", **TORCHSCALE}),
    "torchscale_post": ("torchscale", {"scheme": "post", **TORCHSCALE}),
    "normformer": ("fairseq", {"scheme": "normformer", "activation": "gelu", **FAIRSEQ}),
    "normformer_resid": ("fairseq", {"scheme": "normformer_residual", "activation": "gelu", **FAIRSEQ}),
    "residual": ("fairseq", {"scheme": "residual", "activation": "relu", **FAIRSEQ}),
    "residual_scaled": ("fairseq", {"scheme": "residual_scaled", "activation": "relu", **FAIRSEQ}),
    "simplegpt": ("simplegpt", {"num_kv_heads": 2, "mlp_dim": 56}),
    # The golden "ngpt" has the rotation of the published repository, which is none.
    "ngpt_rope": ("ngpt", {"mlp_dim": 128}),
    "ngpt_rope_normalized": ("ngpt", {"mlp_dim": 128}),
    "siamese_hybrid_pre": ("siamese", {"scheme": "siamese_hybrid_pre", **SIAMESE}),
    "siamese_attn_norm": ("siamese", {"scheme": "siamese_attn_norm", **SIAMESE}),
}


def _case(name, **changes):
    project, keys = CASES[name]
    with np.load(GOLDENS / f"{name}.npz") as file:
        return project, hn.ModelConfig(**(SIZES | PROJECTS[project].keys | keys | changes)), dict(file)


def _part(golden, prefix):
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


@pytest.fixture(autouse=True)
def scaled_residual():
    """ResiDual with the factors of the golden residual_scaled: a scheme of one's own."""
    ends = hn.SideStream(start_scale=0.5, main_scale=0.7, side_norm_eps=1e-7)
    sublayer = hn.SublayerPlacement(post=True, side="written", side_scale=0.5)
    enter = hn.scheme("residual_scaled", final_norm=False, side_stream=ends)
    enter(lambda layer, num_layers: hn.BlockPlacement(sublayer, sublayer))


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_authors_is_reproduced(name):
    project, config, golden = _case(name)
    params = params_from_authors(project, config, _part(golden, "param/"))
    tokens = jnp.asarray(golden["tokens"])

    def loss_fn(params):
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    expected = params_from_authors(project, config, _part(golden, "grad/"))
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
    ("name", "scheme"), [("torchscale_subln", "pre"), ("normformer_resid", "normformer"), ("siamese_attn_norm", "pre")]
)
def test_a_checkpoint_of_another_scheme_is_refused_by_name(name, scheme):
    project, config, golden = _case(name, scheme=scheme)
    with pytest.raises(hn.UserError, match=r"^[\w./]+: (in the checkpoint, but|this architecture has no tensor)"):
        params_from_authors(project, config, _part(golden, "param/"))
