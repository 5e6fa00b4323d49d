"""Pre-LN -> Pre-RMSNorm -> Pre-CRMSNorm on our own Decoder, in float64: the same function, with the same gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compared_models import layernorm_model, logits
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence as eq
from hybridnorm_jax.equivalence.decoder_forms import EMBEDDING_CENTRING
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.equivalence.model_params import assert_params

GPT2_LIKE = {
    "scheme": "pre",
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
    "positions": "learned",
    "max_positions": 16,
    "activation": "gelu_tanh",
    "num_kv_heads": 4,
}
MODELS = {
    "gpt2": GPT2_LIKE,
    "neox": {"scheme": "parallel", "norm_bias": True, "attention_bias": True, "mlp_bias": True, "rotary_dim": 4},
    "no_biases": {"scheme": "pre", "num_kv_heads": 2},
    "norm_biases_alone": {"scheme": "pre", "norm_bias": True},
    "bare_norms_tied": {"scheme": "pre", "norm_scale": False, "tie_embeddings": True},
    "bare_norms_tied_head_bias": {"scheme": "pre", "norm_scale": False, "tie_embeddings": True, "head_bias": True},
    "input_scales": {"scheme": "layernorm_scaling", "norm_bias": True},
    "scales_that_start_elsewhere": {"scheme": "layernorm_scaling_learned", "norm_bias": True},
    "norms_in_heads": {"scheme": "pre_qkvc_pre", "norm_bias": True},
    "offset": GPT2_LIKE | {"position_offset": 2, "activation": "relu"},
    # What other people's Pre-LN models have besides.
    "biases_of_writers_alone": {"scheme": "pre", "attention_output_bias": True, "mlp_output_bias": True},
    "biases_of_readers_alone": {
        **{"scheme": "pre", "norm_bias": True, "attention_bias": True, "attention_output_bias": False},
        **{"mlp_bias": True, "mlp_output_bias": False},
    },
    "scales_from_zero": {"scheme": "pre_qk_pre", "norm_bias": True, "norm_scale_plus_one": True},
    "one_norm_for_both": {"scheme": "parallel_one_norm", "norm_bias": True, "mlp_bias": True},
    "one_norm_for_both_qk": {"scheme": "parallel_one_norm_qk", "attention_norm_per_head": True, "logit_scale": 0.5},
    "layer_scale": {"scheme": "pre", "layer_scale": True, "attention_output_bias": True, "mlp_bias": True},
    "multipliers": {
        **{"scheme": "pre", "embedding_scale": 5.5, "branch_multiplier": 0.25, "logit_scale": 0.7, "logit_cap": 1.5},
        **{"tie_embeddings": True},
    },
    "sinusoids": {
        **{"scheme": "pre", "norm_bias": True, "positions": "sinusoidal", "max_positions": 16, "position_offset": 2},
        **{"embedding_scale": 5.5, "activation": "relu_squared"},
    },
    "bloom": {
        **{"scheme": "pre", "norm_bias": True, "positions": "alibi", "embedding_norm": "true", "tie_embeddings": True},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "bare_norm_of_the_table": {
        **{"scheme": "pre", "norm_scale": False, "embedding_norm": "true", "tie_embeddings": True},
        **{"embedding_scale": 3.0},
    },
    # A norm of tokens and positions together leaves a mean behind it, which is subtracted.
    "norm_of_tokens_and_positions": GPT2_LIKE | {"embedding_norm": "true", "embedding_scale": 3.0},
    "norm_of_tokens_and_positions_with_head_bias": {
        **{"scheme": "pre_qk_pre", "norm_bias": True, "norm_scale_plus_one": True, "attention_norm_scale": False},
        **{"positions": "learned", "max_positions": 16, "embedding_norm": "true", "head_bias": True},
    },
    "norm_of_tokens_and_sinusoids": {
        **{"scheme": "parallel_one_norm", "embedding_norm": "true", "positions": "sinusoidal", "max_positions": 16},
        **{"num_experts": 3, "experts_per_token": 2},
    },
    "bare_norm_of_tokens_and_positions_tied": {
        **{"scheme": "pre", "norm_scale": False, "positions": "learned", "max_positions": 16},
        **{"embedding_norm": "true", "tie_embeddings": True},
    },
    "other_norms_outside": {"scheme": "pre", "norm_bias": True, "outer_norm_scale": False, "outer_norm_bias": False},
    "other_norms_inside": {
        **{"scheme": "pre", "norm_scale": False, "outer_norm_scale": True, "outer_norm_bias": True},
        **{"tie_embeddings": True},
    },
    "centred_already": GPT2_LIKE | {"embedding_centring": True},
    "sinks_windows_and_clips": {
        **{"scheme": "pre", "norm_bias": True, "attention_sinks": True, "windows": (3, 0), "qkv_clip": 1.0},
        **{"score_cap": 2.0},
    },
    "dense_among_sparse": {
        **{"scheme": "pre", "norm_bias": True, "num_experts": 3, "experts_per_token": 3, "dense_layers": (1,)},
        **{"shared_experts": 1, "shared_mlp_dim": 24, "layer_scale": True},
    },
    "gated_shared_expert": {
        **{"scheme": "pre", "num_experts": 3, "experts_per_token": 3, "router_bias": True, "layer_scale": True},
        **{"shared_experts": 1, "shared_expert_gate": True, "mlp_output_bias": True},
    },
    # The norm's bias moves the gate, too, which takes a bias of its own.
    "gated_shared_expert_behind_a_biased_norm": {
        **{"scheme": "pre", "norm_bias": True, "num_experts": 3, "experts_per_token": 3},
        **{"shared_experts": 1, "shared_expert_gate": True},
    },
    "gate_with_a_bias": {
        **{"scheme": "pre", "num_experts": 3, "experts_per_token": 3, "shared_experts": 1},
        **{"shared_expert_gate": True, "shared_expert_gate_bias": True},
    },
}
# What names of the model's parts say has happened, of those above.
CHANGED = {
    "bloom": ["the norm after the embedding is part of the token table", "the tied head has a matrix of its own"],
    "sinusoids": ["positions: the table of sines and cosines is a learned one"],
    "layer_scale": ["layer scale is part of the branches' last projections"],
    "no_biases": [],
    "norm_of_tokens_and_positions": ["the tied head has a matrix of its own"],
    "norm_of_tokens_and_positions_with_head_bias": [],
    "norm_of_tokens_and_sinusoids": ["positions: the table of sines and cosines is a learned one"],
    "other_norms_inside": ["the tied head has a matrix of its own"],
    "centred_already": ["the tied head has a matrix of its own"],
}
# Where a mean is still subtracted.
CENTRED = {name for name in MODELS if "norm_of_tokens_and" in name}


# One of everything that a conversion folds, moves or must leave alone.
QUICK = (
    *(
        "gpt2",
        "neox",
        "norms_in_heads",
        "biases_of_readers_alone",
        "one_norm_for_both_qk",
        "layer_scale",
        "multipliers",
    ),
    *("bloom", "norm_of_tokens_and_positions_with_head_bias", "bare_norm_of_tokens_and_positions_tied"),
    *("other_norms_inside", "sinks_windows_and_clips", "gated_shared_expert_behind_a_biased_norm", "sinusoids"),
    "bare_norm_of_the_table",
)


# With what each has to be: (form, pad_to) -> (norm, width).
FORMS = {
    ("pre_rmsnorm", 1): ("rmsnorm", 32),
    ("pre_crmsnorm", 1): ("crmsnorm", 31),
    ("pre_crmsnorm", 24): ("crmsnorm", 48),
}
# A form without the mean takes all steps of the one with it, so `make test` has the others for one of both.
IN_ALL_FORMS = ("gpt2", "sinks_windows_and_clips")
CASES = [(name, *form) for name in MODELS for form in FORMS]
QUICK_CASES = [
    (name, form, pad_to)
    for number, name in enumerate(QUICK)
    for form, pad_to in (FORMS if name in IN_ALL_FORMS else list(FORMS)[1 + number % 2 : 2 + number % 2])
]


@pytest.mark.parametrize("case", others_are_long(CASES, QUICK_CASES), ids=lambda case: "-".join(map(str, case)))
def test_all_forms_compute_the_same_logits(case, small_config, random_params, tokens):
    name, form, pad_to = case
    with jax.enable_x64(True):
        config, params = layernorm_model(small_config, random_params, MODELS[name])
        expected = logits(config, params, tokens)
        if form == "pre_rmsnorm":
            converted, theirs = eq.to_pre_rmsnorm(config, params)
        else:
            converted, theirs = eq.to_pre_crmsnorm(config, params, pad_to=pad_to)
        assert converted.embedding_centring == (name in CENTRED)
        assert (converted.norm, converted.d_model) == FORMS[form, pad_to]
        assert (converted.norm_scale, converted.norm_bias) == (False, False)
        found = logits(converted, theirs, tokens)
        assert float(abs(found - expected).max() / abs(expected).max()) < 1e-12
        assert_params(converted, theirs)


@pytest.mark.parametrize("name", CHANGED)
def test_what_else_has_changed_is_named(name, small_config):
    config = small_config(norm="layernorm", **MODELS[name])
    assert list(eq.conversion_of(config, "pre_rmsnorm").changes) == CHANGED[name]
    for form in ("pre_rmsnorm", "pre_crmsnorm"):
        assert eq.conversion_of(config, form).centrings == ((EMBEDDING_CENTRING,) if name in CENTRED else ())


NEEDED = ["norm_of_tokens_and_positions", "norm_of_tokens_and_sinusoids"]


@pytest.mark.parametrize("name", others_are_long(NEEDED, NEEDED[:1]))
def test_without_the_centring_it_is_another_model(name, small_config, random_params, tokens):
    """The centring is needed: a norm's scale and bias give what it normalized a mean."""
    with jax.enable_x64(True):
        config, params = layernorm_model(small_config, random_params, MODELS[name])
        expected = logits(config, params, tokens)
        for convert in (eq.to_pre_rmsnorm, eq.to_pre_crmsnorm):
            form, converted = convert(config, params)
            without = logits(dataclasses.replace(form, embedding_centring=False), converted, tokens)
            assert float(abs(without - expected).max() / abs(expected).max()) > 1e-3


def test_what_stands_outside_a_centring_keeps_its_parameters(small_config, random_params):
    config, params = layernorm_model(small_config, random_params, MODELS["norm_of_tokens_and_positions"], "float32")
    for convert in (eq.to_pre_rmsnorm, eq.to_pre_crmsnorm):
        _, converted = convert(config, params)
        for norm in ("embedding_norm", "final_norm"):
            jax.tree.map(np.testing.assert_array_equal, converted[norm], params[norm])
        np.testing.assert_array_equal(converted["head"]["kernel"], params["token_embedding"]["embedding"].T)


def test_no_output_projection_gets_a_bias_that_it_does_not_need(small_config, random_params):
    config, params = layernorm_model(small_config, random_params, MODELS["norm_biases_alone"], "float32")
    form, converted = eq.to_pre_rmsnorm(config, params)
    run = converted["run_0"]
    assert "bias" in run["attention"]["query"]
    assert "bias" in run["feed_forward"]["up"]
    assert "bias" not in run["attention"]["out"]
    assert "bias" not in run["feed_forward"]["down"]
    assert (form.attention_output_bias, form.mlp_output_bias) == (False, False)


def test_a_tied_head_stays_tied_where_it_may(small_config, random_params):
    bare, params = layernorm_model(small_config, random_params, MODELS["bare_norms_tied"], "float32")
    assert eq.to_pre_rmsnorm(bare, params)[0].tie_embeddings
    assert not eq.to_pre_crmsnorm(bare, params)[0].tie_embeddings
    assert not eq.to_pre_rmsnorm(*layernorm_model(small_config, random_params, GPT2_LIKE, "float32"))[0].tie_embeddings


def test_a_tree_that_is_not_the_models_is_refused_in_one_line(small_config, random_params):
    config, params = layernorm_model(small_config, random_params, {"scheme": "pre"}, "float32")
    with pytest.raises(
        eq.LayoutError, match=r": missing; params must be the tree of build_model\(config\), variables\['params'\]$"
    ):
        eq.to_pre_rmsnorm(config, {"params": params})
    for change, message in (
        ({"run_0": params["run_0"] | {"feed_forward": {}}}, r"^run_0/feed_forward/\w+/kernel: missing"),
        (
            {"head": {"kernel": np.ones((32, 60), np.float32)}},
            r"^head/kernel: has shape \(32, 60\), but .* \(32, 61\)$",
        ),
        (
            {"head": {"kernel": np.ones((32, 61), np.float16)}},
            r"^head/kernel: is float16, but token_embedding/embedding is float32$",
        ),
        ({"stranger": np.ones(3, np.float32)}, r"^stranger: a model of this config has no such parameter$"),
    ):
        with pytest.raises(eq.LayoutError, match=message):
            eq.to_pre_crmsnorm(config, params | change)
    with pytest.raises(eq.LayoutError, match=r"^params: must be the tree of build_model"):
        eq.to_pre_rmsnorm(config, None)


def test_norms_inside_heads_stay_what_they_are(small_config, random_params):
    config, params = layernorm_model(small_config, random_params, MODELS["norms_in_heads"], "float32")
    form, converted = eq.to_pre_crmsnorm(config, params)
    assert form.attention_norm_kind == "layernorm"
    for name in ("q_norm", "k_norm", "v_norm", "context_norm"):
        for leaf in ("scale", "bias"):
            before, after = params["run_0"]["attention"][name][leaf], converted["run_0"]["attention"][name][leaf]
            np.testing.assert_array_equal(after, before)


GRADIENTS = (
    *("gpt2", "neox", "scales_from_zero", "one_norm_for_both", "layer_scale", "bloom", "gated_shared_expert"),
    "norm_of_tokens_and_positions",
)


GRADIENT_CASES = [(name, *form) for name in GRADIENTS for form in FORMS]
QUICK_GRADIENTS = [("one_norm_for_both", "pre_rmsnorm", 1), ("norm_of_tokens_and_positions", "pre_crmsnorm", 24)]


@pytest.mark.parametrize(
    "case", others_are_long(GRADIENT_CASES, QUICK_GRADIENTS), ids=lambda case: "-".join(map(str, case))
)
def test_gradients_with_respect_to_theta_are_equal(case, small_config, random_params, tokens):
    name, form, pad_to = case
    with jax.enable_x64(True):
        config, params = layernorm_model(small_config, random_params, MODELS[name])
        direction = np.random.default_rng(3).standard_normal((2, 12, 61))

        def loss(config, convert):
            return lambda theta: (hn.Decoder(config).apply({"params": convert(theta)}, tokens) * direction).sum()

        expected = jax.jit(jax.grad(loss(config, lambda theta: theta)))(params)
        conversion = eq.conversion_of(config, form, pad_to=pad_to)
        found = jax.jit(jax.grad(loss(conversion.config, conversion.convert)))(params)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            # A key's bias cancels in the softmax: its gradient is zero, and rounding in both; others are above 1.
            size = max(np.linalg.norm(theirs), 1.0)
            assert np.linalg.norm(ours - theirs) / size < 1e-11, jax.tree_util.keystr(path)


@pytest.mark.parametrize("pad_to", [1, 16])
def test_decompression_is_the_way_back(pad_to, small_config, random_params, tokens):
    with jax.enable_x64(True):
        config, params = layernorm_model(small_config, random_params, GPT2_LIKE)
        full, centred = eq.to_pre_rmsnorm(config, params)
        layout = eq.decoder_layout(full)
        stored = eq.compress(centred, layout, pad_to=pad_to)
        back = eq.decompress(stored, layout, width=32)
        assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, centred)
        expected = logits(config, params, tokens)
        np.testing.assert_allclose(logits(full, back, tokens), expected, rtol=0, atol=1e-11)
        again = eq.compress(back, layout, pad_to=pad_to)
        jax.tree.map(np.testing.assert_array_equal, again, stored)


def test_dtypes_stay(small_config, random_params):
    config, params = layernorm_model(small_config, random_params, GPT2_LIKE, "float32")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for convert in (eq.to_pre_rmsnorm, eq.to_pre_crmsnorm):
        _, converted = convert(config, narrow)
        assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": "pre", "norm": "rmsnorm"}, r"model\.norm=rmsnorm: only LayerNorm"),
        ({"scheme": "post", "norm": "layernorm"}, r"model\.scheme=post: a post norm at attention of layer 0"),
        ({"scheme": "sandwich", "norm": "layernorm"}, r"model\.scheme=sandwich: a branch norm at attention of layer 0"),
        ({"scheme": "mix_ln", "norm": "layernorm", "num_layers": 4}, r"model\.scheme=mix_ln: a post norm"),
        ({"scheme": "qk_pre", "norm": "layernorm"}, r"attention of layer 0 reads the stream without a norm"),
        ({"scheme": "pre", "norm": "crmsnorm"}, r"model\.norm=crmsnorm"),
        (
            {"scheme": "sandwich"},
            r"model\.norm=rmsnorm, and model\.scheme=sandwich: a branch norm at attention of layer 0",
        ),
    ],
    ids=str,
)
def test_what_the_theorem_does_not_cover_is_refused_by_name(keys, message, small_config):
    for convert in (eq.to_pre_rmsnorm, eq.to_pre_crmsnorm):
        with pytest.raises(hn.ConfigError, match=message) as error:
            convert(small_config(**keys), {})
        assert "\n" not in str(error.value)


def test_scales_that_start_elsewhere_need_a_scheme_in_which_they_do_not(small_config):
    sublayer = hn.SublayerPlacement(pre=True, pre_norm_init=0.5, branch_scale=0.7)
    hn.scheme("mine")(lambda layer, num_layers: hn.BlockPlacement(sublayer, sublayer))
    config = small_config(scheme="mine", norm="layernorm")
    with pytest.raises(hn.ConfigError, match=r"model\.scheme=mine: starts a norm's scale at another value than 1"):
        eq.to_pre_rmsnorm(config, {})
    plain = hn.SublayerPlacement(pre=True, branch_scale=0.7)
    hn.scheme("twin")(lambda layer, num_layers: hn.BlockPlacement(plain, plain))
    assert conversion_of(config, "pre_rmsnorm").config.scheme == "twin"


def test_a_model_of_one_layer_and_a_foreign_scale(small_config, random_params, tokens):
    """Means far larger than deviations: float32 keeps what LayerNorm's two passes keep."""
    config, params = layernorm_model(small_config, random_params, {"scheme": "pre", "num_layers": 1}, "float32")
    table = params["token_embedding"]["embedding"] + np.float32(1000)
    params = params | {"token_embedding": {"embedding": table}}
    form, converted = eq.to_pre_rmsnorm(config, params)
    wide = dataclasses.replace(config, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        expected = logits(wide, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), tokens)
    np.testing.assert_allclose(logits(form, converted, tokens), expected, atol=2e-3)
