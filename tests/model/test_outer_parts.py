"""Scales, caps and shared norms: models with them are what NumPy makes of them, trained, sharded and continued."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.embedding import Embedding
from hybridnorm_jax.training.step import batch_loss
from tests.model.fresh_leaves import fresh_leaves
from tests.model.numpy_decoder import forward

PARTS = {
    "norm_scale_plus_one": {"scheme": "sandwich_qk", "norm_scale_plus_one": True},
    "norm_scale_plus_one over projections": {"scheme": "reordered", "norm_scale_plus_one": True},
    "norm_scale_plus_one with layernorm": {
        **{"scheme": "pre_qk_pre", "norm": "layernorm", "norm_bias": True, "norm_scale_plus_one": True},
        **{"attention_norm_scale": True, "attention_norm_bias": False},
    },
    "embedding_scale": {"scheme": "pre", "embedding_scale": math.sqrt(32), "tie_embeddings": True},
    "embedding_scale before a norm": {"scheme": "peri", "embedding_scale": 3.5, "norm_eps": 0.5},
    "logit_scale": {"scheme": "pre", "logit_scale": 0.0625, "head_bias": True},
    "logit_cap": {"scheme": "pre", "logit_cap": 2.0, "tie_embeddings": True},
    "logit_scale and logit_cap": {"scheme": "span", "logit_scale": 0.3, "logit_cap": 1.5, "head_bias": True},
    "branch_multiplier": {"scheme": "deepnorm", "branch_multiplier": 0.22},
    "branch_multiplier and branch scales": {"scheme": "hybrid_depth_scaled", "branch_multiplier": 0.5},
    "layer_scale": {"scheme": "pre", "norm": "layernorm", "norm_bias": True, "layer_scale": True},
    "embedding_centring": {"scheme": "pre", "embedding_centring": True, "embedding_scale": 2.0},
    "embedding_centring behind a norm": {"scheme": "peri", "embedding_centring": True, "norm_bias": True},
    "outer_norm_scale": {"scheme": "hybrid", "outer_norm_scale": False, "embedding_norm": "true"},
    "outer_norm_bias": {"scheme": "pre", "outer_norm_bias": True, "embedding_norm": "true"},
    "whole_outside": {"scheme": "pre", "norm": "crmsnorm", "whole_outside": True, "tie_embeddings": True},
    "whole_outside and centred": {
        **{"scheme": "parallel", "norm": "crmsnorm", "whole_outside": True, "embedding_centring": True},
        **{"norm_scale": False, "outer_norm_scale": True, "outer_norm_bias": True, "embedding_norm": "true"},
    },
    "layer_scale behind a branch norm": {"scheme": "sandwich", "layer_scale": True, "branch_multiplier": 2.0},
    "parallel_one_norm": {"scheme": "parallel_one_norm", "norm": "layernorm", "norm_bias": True},
    "parallel_qk": {"scheme": "parallel_qk"},
    "parallel_one_norm_qk": {"scheme": "parallel_one_norm_qk", "norm": "layernorm"},
    "sandwich_qk": {"scheme": "sandwich_qk"},
}


@pytest.mark.parametrize("name", ["outer_norm_scale", "outer_norm_bias"])
def test_a_key_of_norms_outside_the_blocks_needs_such_norms(name, small_config):
    usual = {"outer_norm_scale": True, "outer_norm_bias": False}[name]
    typed = "false" if usual else "true"
    assert small_config(scheme="post", **{name: usual})
    assert small_config(scheme="post", embedding_norm="true", **{name: not usual})
    with pytest.raises(ConfigError, match=f"model.{name}={typed}: model.scheme=post has no norms outside its blocks"):
        small_config(scheme="post", **{name: not usual})


def _loss(config, params, tokens, **inputs):
    """Of predicting the next token, by a loss of one line."""
    logits = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens[:, :-1], **inputs)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).sum()


@pytest.mark.parametrize("name", PARTS)
def test_the_decoder_is_the_one_in_numpy(name, small_config, random_params, tokens):
    config = small_config(**PARTS[name], dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        params = random_params(config)
        logits = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
    expected = forward(config, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", [name for name in PARTS if not PARTS[name].get("whole_outside")])
def test_the_part_is_there(name, small_config, random_params, tokens):
    """Without its keys, or with the scheme that lacks it, the model gives other logits for the same numbers.

    The model in NumPy, which the test above finds to be ours.
    """
    without = {"parallel_one_norm": "parallel", "parallel_one_norm_qk": "parallel_qk", "parallel_qk": "parallel"}
    without |= {"sandwich_qk": "sandwich"}
    keys = PARTS[name]
    kept = ("scheme", "norm", "norm_bias", "norm_eps", "tie_embeddings", "head_bias")
    plain = {key: keys[key] for key in kept if key in keys}
    plain["scheme"] = without.get(name, plain["scheme"])
    config, other = small_config(**keys), small_config(**plain)
    assert config != other
    params = random_params(config)
    left = _filled(random_params(other, seed=1), params)
    there, absent = (forward(each, leaves, tokens) for each, leaves in ((config, params), (other, left)))
    assert np.abs(there - absent).max() > 1e-3 * np.abs(there).max()


def test_outside_the_blocks_vectors_are_whole(small_config):
    """The stream is as wide as d_model, and what is outside by one channel wider, or as wide as norm_width."""
    for keys, width in (({}, 33), ({"norm_width": 30}, 30)):
        params = abstract_params(small_config(**PARTS["whole_outside and centred"], **keys))
        assert params["token_embedding"]["embedding"].shape == (61, width)
        assert params["embedding_norm"]["bias"].shape == params["final_norm"]["bias"].shape == (width,)
        assert params["head"]["kernel"].shape == (width, 61)
        assert params["run_0"]["attention"]["query"]["kernel"].shape[1] == 32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"whole_outside": True}, r"model\.whole_outside=true: only for model\.norm=crmsnorm"),
        ({"whole_outside": True, "norm": "layernorm"}, r"model\.whole_outside=true: only for model\.norm=crmsnorm"),
        (
            {"embedding_centring": True, "norm": "crmsnorm"},
            r"model\.embedding_centring=true: model\.norm=crmsnorm needs model\.whole_outside: what is stored",
        ),
    ],
)
def test_what_means_nothing_outside_the_blocks_is_refused(keys, message, small_config):
    with pytest.raises(hn.ConfigError, match=message):
        small_config(scheme="pre", **keys)
    with pytest.raises(hn.ConfigError, match=message):
        hn.EncoderConfig(scheme="pre", d_model=32, num_layers=1, num_heads=4, **keys)


def _filled(tree, by):
    """The tree with every leaf that is in `by`, too, taken from there."""
    if isinstance(tree, dict):
        return {name: _filled(branch, by.get(name, {})) for name, branch in tree.items()}
    return by if hasattr(by, "shape") else tree


LEARNED = ["norm_scale_plus_one", "layer_scale behind a branch norm", "parallel_one_norm_qk"]


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_are_finite_differences(name, small_config, random_params, tokens):
    config = small_config(**PARTS[name], dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        params = random_params(config)
        rng = np.random.default_rng(3)
        direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
        length = math.sqrt(sum(np.vdot(leaf, leaf) for leaf in jax.tree.leaves(direction)))
        direction = jax.tree.map(lambda leaf: leaf / length, direction)
        loss = jax.jit(jax.value_and_grad(lambda params: _loss(config, params, tokens)))
        gradient = loss(params)[1]
        slope = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        step = 1e-5
        ends = [float(loss(jax.tree.map(lambda a, b, s=s: a + s * b, params, direction))[0]) for s in (step, -step)]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6)


SCALED = ["logit_scale and logit_cap", "logit_cap", "logit_scale"]


@pytest.mark.parametrize("name", others_are_long(SCALED, SCALED[:1]))
def test_the_loss_in_chunks_and_its_gradient_are_those_of_whole_logits(name, small_config, random_params, tokens):
    config = small_config(**PARTS[name], dtype="float64", param_dtype="float64")
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones(tokens.shape, np.float32)}
    with jax.enable_x64(True):
        params = random_params(config)

        def loss(params, chunk):
            return batch_loss(hn.Decoder(config), {"params": params}, batch, chunk=chunk, z_loss=0.1)[0]

        compiled = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        chunked, whole = (compiled(params, chunk) for chunk in (4, None))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11, err_msg=jax.tree_util.keystr(path))
    logits = forward(config, params, tokens)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chunked[0], (nll + 0.1 * log_z**2).sum(), rtol=1e-10)


@pytest.mark.parametrize("remat", others_are_long(["full", "all_but_attention"], ["full"]))
@pytest.mark.parametrize("name", others_are_long(LEARNED, ["parallel_one_norm_qk"]))
def test_what_is_computed_again_is_the_same(name, remat, small_config, random_params, tokens):
    config = small_config(**PARTS[name])
    params = random_params(config)
    plain, again = (
        jax.jit(jax.grad(lambda params, each=each: _loss(each, params, tokens)))(params)
        for each in (config, dataclasses.replace(config, remat=remat))
    )
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", others_are_long(["hybrid_output_norm", "qkvc_post", "reordered"], ["qkvc_post"]))
def test_scales_that_are_stored_less_1_start_less_1_and_start_the_same_model(scheme, small_config, tokens):
    plain, less = (small_config(scheme=scheme, norm_scale_plus_one=each) for each in (False, True))
    params, stored = (jax.jit(hn.Decoder(each).init)(jax.random.key(0), tokens)["params"] for each in (plain, less))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(stored), jax.tree.leaves(params), strict=True):
        shift = 1 if path[-1].key == "scale" else 0
        np.testing.assert_allclose(ours + shift, theirs, rtol=1e-6, atol=1e-7, err_msg=jax.tree_util.keystr(path))
    logits = [jax.jit(hn.Decoder(c).apply)({"params": p}, tokens) for c, p in ((plain, params), (less, stored))]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_a_norm_with_its_scale_less_1_in_bfloat16_multiplies_in_float32():
    """A scale of 1 + 2^-10 is no bfloat16 number, and stored less 1 it is one."""
    x = jnp.asarray([[3.0, -1.0, 2.0, 5.0]], jnp.bfloat16)
    norm = hn.Norm(scale_plus_one=True, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    params = {"scale": jnp.full(4, 2.0**-10, jnp.bfloat16)}
    expected = hn.rms_norm(x.astype(jnp.float32), eps=1e-6) * (1 + 2.0**-10)
    np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=1e-6)


def test_the_factor_of_the_embedding_is_rounded_as_gemma_rounds_it():
    module = Embedding(rows=2, width=1, std=1.0, dtype="bfloat16", param_dtype="float32", scale=math.sqrt(3072))
    rows = module.apply({"params": {"embedding": jnp.asarray([[1.0], [3.0]])}}, jnp.asarray([[0, 1]]))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[0, :, 0].astype(np.float32), [55.5, 166.0])  # 166.5 has no place in 8 bits


def test_layer_scale_starts_at_1(small_config):
    config = small_config(scheme="pre", layer_scale=True)
    scale = fresh_leaves(config, "layer_scale")["run_0/feed_forward_layer_scale/scale"]
    assert scale.shape == (3, 32)
    assert (np.asarray(scale) == 1).all()


def test_a_shared_norm_is_one_set_of_parameters(small_config):
    config = small_config(scheme="parallel_one_norm")
    params = hn.model.abstract_params.abstract_params(config)["run_0"]
    assert "attention_pre_norm" in params
    assert "feed_forward_pre_norm" not in params


def test_a_shared_norm_belongs_to_a_parallel_block():
    pre = hn.SublayerPlacement(pre=True)
    for attention, feed_forward in (
        (pre, pre),
        (hn.SublayerPlacement(), hn.SublayerPlacement(pre=True, reads="block")),
        (pre, hn.SublayerPlacement(reads="block")),
    ):
        with pytest.raises(ValueError, match="shared_pre_norm"):
            hn.BlockPlacement(attention, feed_forward, shared_pre_norm=True)
    assert "one pre norm for both branches" in hn.describe("parallel_one_norm", 3)
    assert "one pre norm" not in hn.describe("parallel", 3)


CONTINUED = ["logit_scale and logit_cap", "embedding_scale", "norm_scale_plus_one", "layer_scale"]


@pytest.mark.parametrize("name", others_are_long(CONTINUED, CONTINUED[:1]))
def test_text_is_continued_by_the_whole_model(name, small_config, random_params):
    """Token by token with a cache, and by whole forward passes."""
    config = small_config(**PARTS[name])
    params = random_params(config)
    prompt, count = np.arange(1, 6), 4
    (new,) = hn.generate(config, params, [prompt], max_new_tokens=count)
    text = list(prompt)
    for _ in range(count):
        logits = forward(config, params, np.asarray([text]))[0, -1]
        text.append(int(logits.argmax()))
    assert list(new) == text[len(prompt) :]
