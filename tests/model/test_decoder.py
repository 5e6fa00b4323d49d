"""What a decoder means: causal, the same scanned or not, in pieces or whole, in any dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.kernels.head_preparation import rotate
from hybridnorm_jax.model.block import stream_norm
from hybridnorm_jax.model.embedding import Embedding
from hybridnorm_jax.model.rotation import rotation


@functools.cache
def _compiled(config):
    return jax.jit(hn.Decoder(config).apply, static_argnames="deterministic")


def _logits(config, params, tokens, **inputs):
    return _compiled(config)({"params": params}, jnp.asarray(tokens), **inputs)


def _gradient(config, params, tokens):
    def loss(params):
        return jnp.square(_logits(config, params, tokens)).mean()

    return jax.jit(jax.grad(loss))(params)


def _assert_trees_close(ours, expected, tolerance):
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(left - right) / np.linalg.norm(right)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


def test_the_tree_is_plain_nested_dicts_of_the_documented_paths(small_config, tokens):
    config = small_config(scheme="hybrid_star")
    params = jax.eval_shape(hn.Decoder(config).init, jax.random.key(0), tokens)["params"]
    assert type(params) is dict
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    assert shapes["run_1/attention/query/kernel"] == (2, 32, 4, 8)
    assert shapes["run_1/attention/value/kernel"] == (2, 32, 2, 8)
    assert shapes["run_1/attention/q_norm/scale"] == (2, 8)
    assert shapes["run_0/attention_pre_norm/scale"] == (1, 32)
    assert shapes["run_1/attention_post_norm/scale"] == (2, 32)
    assert shapes["run_1/feed_forward/down/kernel"] == (2, 48, 32)
    assert shapes["head/kernel"] == (32, 61)
    assert "run_1/attention_pre_norm/scale" not in shapes


@pytest.mark.parametrize(
    "scheme",
    others_are_long(
        ["hybrid_star", "mix_ln", "span", "layernorm_scaling", "parallel"], ["mix_ln", "layernorm_scaling", "parallel"]
    ),
)
def test_scanned_layers_equal_a_loop_over_blocks(scheme, small_config, random_params, tokens):
    config = small_config(scheme=scheme, num_layers=5, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        params = random_params(config)
        stream = jnp.take(params["token_embedding"]["embedding"], tokens, axis=0)
        for number, run in enumerate(config.runs):
            for index in range(run.length):
                layer = jax.tree.map(lambda leaf, index=index: leaf[index], params[f"run_{number}"])
                block = hn.Block(config=config, placement=run.layers[index].placement, layer=run.start + index)
                stream = block.apply({"params": layer}, stream)
        if config.has_final_norm:
            stream = stream_norm(config).apply({"params": params["final_norm"]}, stream)
        expected = stream @ params["head"]["kernel"]
        for unroll in (1, 2, 5):
            ours = _logits(dataclasses.replace(config, scan_unroll=unroll), params, tokens)
            np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("policy", others_are_long(["full", "all_but_attention", "dots", "dots_no_batch"], ["full"]))
def test_rematerialization_changes_no_gradient(policy, small_config, random_params, tokens):
    config = small_config(scheme="hybrid_star")
    params = random_params(config)
    ours = _gradient(dataclasses.replace(config, remat=policy), params, tokens)
    _assert_trees_close(ours, _gradient(config, params, tokens), 1e-6)


@pytest.mark.parametrize(("dropout", "tracings"), [(0.0, 1), (0.5, 2)])
def test_a_block_is_traced_once_where_no_keys_are_drawn(dropout, tracings, small_config, random_params, tokens):
    """With keys Flax traces it twice, and counts both in the keys: once would be other numbers from the same seed."""
    config = small_config(scheme="pre", dropout=dropout)
    params, called = random_params(config), []
    formula = hn.Block.transform

    def counted(*arguments, **keys):
        called.append(1)
        return formula(*arguments, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hn.Block, "transform", counted)
        jax.eval_shape(
            lambda params: hn.Decoder(config).apply(
                {"params": params},
                tokens,
                deterministic=not dropout,
                rngs={"dropout": jax.random.key(0)} if dropout else None,
            ),
            params,
        )
    assert len(called) == tracings


def test_rematerialization_computes_again_also_without_a_loop(small_config, random_params, tokens):
    config = small_config(scheme="pre")
    params = random_params(config)

    def lowered(**keys):
        changed = dataclasses.replace(config, **keys)

        def loss(params):
            return jnp.square(_logits(changed, params, tokens)).mean()

        return jax.jit(jax.grad(loss)).lower(params)

    flops = {policy: lowered(remat=policy).compile().cost_analysis()["flops"] for policy in ("none", "full")}
    assert flops["full"] > 1.1 * flops["none"]
    # Unrolled, only barriers keep the compiler from merging the second computation with the first: one more a layer.
    barriers = {
        (policy, unroll): lowered(remat=policy, scan_unroll=unroll).as_text().count("optimization_barrier")
        for policy in ("none", "full")
        for unroll in (1, 3)
    }
    assert barriers["full", 3] > barriers["none", 3]
    assert barriers["full", 1] == barriers["none", 1]


@pytest.mark.parametrize("scheme", others_are_long(["hybrid_star", "span", "post", "reordered"], ["hybrid_star"]))
def test_bfloat16_is_close_to_float32(scheme, small_config, tokens):
    config = small_config(scheme=scheme)
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), tokens)["params"]
    exact = _logits(config, params, tokens)
    rounded = _logits(dataclasses.replace(config, dtype="bfloat16"), params, tokens)
    assert rounded.dtype == jnp.float32
    # A rounding to 8 bits errs by at most 2^-9; a layer has 19 of activations and 7 of kernels, which over three
    # layers and the head add up like a random walk.
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < (3 * 26 + 2) ** 0.5 * 2**-9


@pytest.mark.parametrize("scheme", others_are_long(["hybrid_star", "span", "peri", "qkvc_post"], ["hybrid_star"]))
def test_no_token_is_seen_before_its_turn(scheme, small_config, random_params, tokens):
    config = small_config(scheme=scheme)
    params = random_params(config)
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = _logits(config, params, tokens), _logits(config, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before - after)[:, 7:].max(-1) > 1e-4).all()


def test_documents_do_not_see_each_other(small_config, random_params, tokens):
    config = small_config(scheme="hybrid_star")
    params = random_params(config)
    segments = np.repeat([[1] * 5 + [2] * 7], 2, axis=0)
    positions = np.repeat([[*range(5), *range(7)]], 2, axis=0)
    changed = tokens.copy()
    changed[:, :5] = (changed[:, :5] + 1) % 61
    before = _logits(config, params, tokens, segment_ids=segments, positions=positions)
    after = _logits(config, params, changed, segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert not np.array_equal(before[:, :5], after[:, :5])
    # And a document is what it would be alone.
    alone = _logits(config, params, tokens[:, 5:])
    np.testing.assert_allclose(before[:, 5:], alone, rtol=1e-5, atol=2e-5)


def test_a_tied_head_reads_the_embedding(small_config, random_params, tokens):
    config = small_config(tie_embeddings=True)
    params = random_params(config)
    assert "head" not in params
    untied = params | {"head": {"kernel": params["token_embedding"]["embedding"].T}}
    expected = _logits(dataclasses.replace(config, tie_embeddings=False), untied, tokens)
    np.testing.assert_allclose(_logits(config, params, tokens), expected, rtol=1e-6, atol=1e-6)


def test_learned_positions_are_added_to_the_embedding(small_config, random_params, tokens):
    config = small_config(positions="learned", max_positions=16, scheme="pre")
    params = random_params(config)
    shifted = _logits(config, params, tokens, positions=jnp.arange(4, 16)[None])
    rolled = params["position_embedding"]["embedding"].copy()
    rolled[:12] = rolled[4:16]
    expected = _logits(config, params | {"position_embedding": {"embedding": rolled}}, tokens)
    np.testing.assert_array_equal(shifted, expected)
    with pytest.raises(ValueError, match="max_positions=16"):
        _logits(config, params, np.zeros((1, 17), np.int32))


def test_rope_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16))
    with jax.enable_x64(True):
        scores = []
        for i, j in ((5, 2), (105, 102), (100_005, 100_002)):
            at = [rotation(jnp.full((1, 1), p), 16, 1e4, jnp.float64) for p in (i, j)]
            scores.append(float((rotate(jnp.asarray(q), at[0]) * rotate(jnp.asarray(k), at[1])).sum()))
    np.testing.assert_allclose(scores, scores[0], rtol=1e-10)


def test_a_partial_rotation_leaves_the_other_channels_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
    turned = rotate(x, rotation(jnp.arange(3)[None], 4, 1e4))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert not np.array_equal(turned[:, 1:, :, :4], x[:, 1:, :, :4])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_one_hidden_layer_activations(activation):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    module = hn.FeedForward(mlp_dim=6, activation=activation, use_bias=True)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    params["up"]["bias"] = jnp.arange(6.0) / 6
    hidden = np.asarray(x @ params["up"]["kernel"] + params["up"]["bias"], np.float64)
    cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    erf = np.asarray(jax.scipy.special.erf(hidden / np.sqrt(2)))
    active = {
        "gelu": hidden * (1 + erf) / 2,
        "gelu_tanh": hidden * (1 + np.tanh(cubic)) / 2,
        "relu": np.maximum(hidden, 0),
    }[activation]
    expected = active @ params["down"]["kernel"] + params["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", others_are_long(["layernorm", "crmsnorm"], ["layernorm"]))
def test_every_norm_kind_with_biases_everywhere(norm, small_config, random_params, tokens):
    config = small_config(norm=norm, norm_bias=True, attention_bias=True, mlp_bias=True, scheme="hybrid_star")
    params = random_params(config)
    assert params["run_1"]["attention"]["query"]["bias"].shape == (2, 4, 8)
    assert params["run_1"]["attention_post_norm"]["bias"].shape == (2, 32)
    assert params["run_1"]["feed_forward"]["down"]["bias"].shape == (2, 32)
    assert np.isfinite(_logits(config, params, tokens)).all()


def test_dropout_needs_asking_for_and_changes_the_logits(small_config, random_params, tokens):
    config = small_config(dropout=0.3)
    params = random_params(config)
    without = _logits(small_config(), params, tokens)
    np.testing.assert_array_equal(_logits(config, params, tokens), without)
    dropped = [
        _logits(config, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])


def test_rope_under_vmap_and_its_gradient():
    x, weights = jax.random.normal(jax.random.key(0), (2, 4, 3, 2, 8))
    by = rotation(jnp.arange(3)[None], 8, 1e4)

    def weighted(x, weights):
        return (rotate(x[None], by) * weights[None]).sum()

    one_by_one = [jax.value_and_grad(weighted)(*pair) for pair in zip(x, weights, strict=True)]
    values, gradients = jax.vmap(jax.value_and_grad(weighted))(x, weights)
    np.testing.assert_allclose(values, [value for value, _ in one_by_one], rtol=1e-6)
    for row, (_, gradient) in zip(gradients, one_by_one, strict=True):
        np.testing.assert_array_equal(row, gradient)
    # The transpose of a rotation is the rotation back.
    np.testing.assert_array_equal(gradients, rotate(weights, (by[0], -by[1])))


def test_an_id_outside_the_vocabulary_does_not_pass_for_a_token(small_config, random_params):
    logits = _logits(small_config(), random_params(small_config()), np.array([[3, 61, 2]]))
    assert np.isnan(logits[:, 1:]).all()


def test_a_bfloat16_model_rotates_in_float32():
    positions, width, theta = np.arange(99_990, 100_000)[None], 8, 1e4
    cos, sin = hn.rotation(jnp.asarray(positions), width, theta, jnp.bfloat16)
    angles = positions[..., None, None] * theta ** (-np.arange(0, width, 2) / width)
    assert cos.dtype == sin.dtype == jnp.float32
    # The first wavelength is 1, whose angles are exact. The next is 10: its float32 may be off by a part in 2^24, which
    # moves an angle of 10,000 by 2^-10.7, and the float32 of such an angle by 2^-11 more. Together under 2^-9.
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=2.0**-9)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=2.0**-9)
    x = jax.random.normal(jax.random.key(0), (1, 10, 2, width), jnp.bfloat16)
    expected = rotate(x.astype(jnp.float32), (cos, sin)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rotate(x, (cos, sin)), expected)


def test_the_gradient_of_the_embedding_is_summed_in_float32():
    table = Embedding(rows=2, width=3, std=1.0, dtype="bfloat16", param_dtype="float32")
    tokens = jnp.zeros((1, 1024), jnp.int32)
    params = table.init(jax.random.key(0), tokens)
    gradient = jax.grad(lambda params: table.apply(params, tokens).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(gradient["params"]["embedding"], [[1024.0] * 3, [0.0] * 3])


def test_rotary_dim_is_an_even_part_of_a_head(small_config):
    assert small_config(head_dim=100, rotary_dim=58).rotary_width == 58
    assert small_config(head_dim=100).rotary_width == 100
    for wrong in (1, 3, 102):
        with pytest.raises(hn.UserError, match=rf"^model\.rotary_dim={wrong}: (rope rotates pairs|must be at least 2)"):
            small_config(head_dim=100, rotary_dim=wrong)
