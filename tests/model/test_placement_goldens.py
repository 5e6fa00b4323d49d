"""Placements as their authors' PyTorch code computes them: logits, loss and every parameter's gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

GOLDENS = Path(__file__).parents[1] / "goldens" / "placements"
# golden file -> our scheme
FAIRSEQ = {"b2t": "b2t", "b2t_repo_post": "post"}


def _config(golden, scheme, **changes):
    return hn.ModelConfig(
        scheme=scheme,
        d_model=32,
        num_layers=int(golden["meta/layers"]),
        num_heads=int(golden["meta/heads"]),
        mlp_dim=48,
        vocab_size=61,
        norm="layernorm",
        norm_bias=True,
        norm_eps=float(golden["meta/eps"]),
        activation="relu",
        attention_bias=True,
        mlp_bias=True,
        positions="learned",
        position_offset=2,  # fairseq's first position is row 2, after the padding's
        max_positions=64,
        embedding_norm="false",
        **changes,
    )


def _from_fairseq(golden, prefix, config, embed_scale):
    """Our tree of the parameters (prefix "param/"), or of their gradients ("grad/").

    fairseq's embedding is embed_scale * table; ours is the table alone, embed_scale times theirs.
    """
    heads, width, layers = config.num_heads, config.d_model, config.num_layers
    scale = embed_scale if prefix == "param/" else 1 / embed_scale

    def stacked(name, shape, *, transposed=False):
        arrays = [golden[f"{prefix}layers.{layer}.{name}"] for layer in range(layers)]
        return np.stack([(array.T if transposed else array).reshape(shape) for array in arrays])

    def dense(name, inputs, outputs):
        kernel = stacked(f"{name}.weight", (*inputs, *outputs), transposed=True)
        return {"kernel": kernel, "bias": stacked(f"{name}.bias", outputs)}

    def norm(name):
        return {"scale": stacked(f"{name}.weight", (width,)), "bias": stacked(f"{name}.bias", (width,))}

    per_head = (heads, config.head_dim)
    return {
        "token_embedding": {"embedding": scale * golden[f"{prefix}embed_tokens.weight"]},
        "position_embedding": {"embedding": golden[f"{prefix}embed_positions_original.weight"]},
        "head": {"kernel": golden[f"{prefix}embed_out"].T},
        "run_0": {
            "attention": {
                "query": dense("self_attn.q_proj", (width,), per_head),
                "key": dense("self_attn.k_proj", (width,), per_head),
                "value": dense("self_attn.v_proj", (width,), per_head),
                "out": dense("self_attn.out_proj", per_head, (width,)),
            },
            "attention_post_norm": norm("self_attn_layer_norm"),
            "feed_forward": {"up": dense("fc1", (width,), (48,)), "down": dense("fc2", (48,), (width,))},
            "feed_forward_post_norm": norm("final_layer_norm"),
        },
    }


@pytest.mark.parametrize("name", FAIRSEQ)
def test_a_decoder_of_fairseq_is_reproduced(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        golden = dict(file)
    config = _config(golden, FAIRSEQ[name])
    embed_scale = float(golden["meta/embed_scale"])
    params = _from_fairseq(golden, "param/", config, embed_scale)
    tokens = jnp.asarray(golden["tokens"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.jit(hn.Decoder(config).init)(jax.random.key(0), tokens)["params"]
    )

    def loss_fn(params):
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    expected = _from_fairseq(golden, "grad/", config, embed_scale)
    # A bias of the keys moves all logits of a query alike: its gradient is zero, and theirs is rounding.
    assert np.abs(grads["run_0"]["attention"]["key"].pop("bias")).max() < 1e-7
    del expected["run_0"]["attention"]["key"]["bias"]
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        # Norm-wise per parameter: elementwise, entries near zero have no relative accuracy in float32.
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_b2t_without_the_connection_is_another_model():
    with np.load(GOLDENS / "b2t.npz") as file:
        golden = dict(file)
    config = _config(golden, "post")
    params = _from_fairseq(golden, "param/", config, float(golden["meta/embed_scale"]))
    logits = hn.Decoder(config).apply({"params": params}, jnp.asarray(golden["tokens"]))
    assert np.abs(logits - golden["logits"]).max() > 0.1
