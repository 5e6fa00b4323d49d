"""Encoders against a plain NumPy forward pass in float64, and what holds for every placement."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.model.abstract_params import abstract_params
from tests.schemes import keys_of

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 24}
# Not square, and with pixels behind the last whole patch.
IMAGES = {"image_size": (13, 8), "patch_size": (3, 4), "num_channels": 2}
PRE_LN = {"scheme": "pre", "norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True}


def encoder_config(**keys):
    images = {} if keys.get("input") == "tokens" else IMAGES
    return hn.EncoderConfig(**{**SIZES, **images, "activation": "gelu", **keys})


def inputs_of(config, batch=2, seq=7):
    random = np.random.default_rng(0)
    if config.reads_pixels:
        return jnp.asarray(random.normal(size=(batch, *config.image_size, config.num_channels)), config.dtype)
    return jnp.asarray(random.integers(0, config.vocab_size, (batch, seq)), jnp.int32)


def random_params(config, seed=0):
    """Every leaf random, so that none can be left out without notice."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract_params(config)
    )


@functools.cache
def compiled(config):
    return jax.jit(hn.build_model(config).apply, static_argnames=("deterministic", "return_features"))


def apply(config, params, inputs, **keys):
    return compiled(config)({"params": params}, inputs, **keys)


# ---- The reference: one image, one layer, one head at a time.


def layer_norm(x, norm, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * norm["scale"] + norm["bias"]


def gelu(x):
    return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def attend(queries, keys, params, *, causal):
    """Attention of two matrices (positions, width)."""
    heads = []
    for head in range(params["query"]["kernel"].shape[1]):
        project = {
            name: source @ params[name]["kernel"][:, head] + params[name]["bias"][head]
            for name, source in (("query", queries), ("key", keys), ("value", keys))
        }
        scores = project["query"] @ project["key"].T / math.sqrt(project["query"].shape[1])
        if causal:
            scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ project["value"] @ params["out"]["kernel"][head])
    return sum(heads) + params["out"]["bias"]


def feed_forward(x, params):
    hidden = gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def patches_of(image, kernel):
    height, width = kernel.shape[:2]
    rows, columns = image.shape[0] // height, image.shape[1] // width
    return [
        np.einsum("hwc,hwcd->d", image[r * height : (r + 1) * height, c * width : (c + 1) * width], kernel)
        for r in range(rows)
        for c in range(columns)
    ]


def reference(config, params, one_input):
    """(last hidden state, pooled) of one image, or one sequence of tokens, of a Pre-LN encoder."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    if config.reads_pixels:
        bias = params["patch_embedding"].get("bias", 0)
        read = [patch + bias for patch in patches_of(np.asarray(one_input), params["patch_embedding"]["kernel"])]
    else:
        read = [params["token_embedding"]["embedding"][token] for token in np.asarray(one_input)]
    learned = [
        row
        for name in ("class_token", "distillation_token", "register_tokens")
        for row in params.get(name, {"embedding": []})["embedding"]
    ]
    table = params["position_embedding"]["embedding"]
    if config.position_scope == "patches":
        read = [vector + row for vector, row in zip(read, table, strict=True)]
        stream = np.stack(learned + read)
    else:
        stream = np.stack(learned + read)
        stream = stream + table[: len(stream)]
    if "embedding_norm" in params:
        stream = layer_norm(stream, params["embedding_norm"], config.norm_eps)
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["run_0"])
        normed = layer_norm(stream, block["attention_pre_norm"], config.norm_eps)
        stream = stream + attend(normed, normed, block["attention"], causal=config.causal)
        normed = layer_norm(stream, block["feed_forward_pre_norm"], config.norm_eps)
        stream = stream + feed_forward(normed, block["feed_forward"])
    normed = layer_norm(stream, params["final_norm"], config.norm_eps)
    hidden = stream if config.norm_pooled_only else normed
    first = len(learned)
    match config.pooling:
        case "class":
            pooled = normed[0]
        case "mean":
            pooled = normed[first:].mean(0)
        case "class_and_mean":
            pooled = np.concatenate([normed[0], normed[first:].mean(0)])
        case "end":
            pooled = normed[first + list(np.asarray(one_input)).index(config.end_token)]
        case "attention":
            pooling = params["pooling"]
            read = attend(pooling["probe"]["embedding"], normed, pooling["attention"], causal=False)
            pooled = read + feed_forward(layer_norm(read, pooling["norm"], config.norm_eps), pooling["feed_forward"])
            pooled = pooled[0]
    return hidden, pooled


MODELS = {
    "vit": {},
    "deit": {"distillation_token": True},
    "dinov2": {"pooling": "class_and_mean", "mask_token": True},
    "registers": {"register_tokens": 3, "position_scope": "patches", "pooling": "mean"},
    "siglip": {"class_token": False, "pooling": "attention"},
    "clip": {"patch_bias": False, "embedding_norm": "true", "norm_pooled_only": True},
    "clip_text": {
        "input": "tokens",
        "vocab_size": 11,
        "max_positions": 9,
        "class_token": False,
        "causal": True,
        "pooling": "end",
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_float64_is_the_reference(name):
    with jax.enable_x64(True):
        config = encoder_config(**PRE_LN, **MODELS[name], dtype="float64", param_dtype="float64")
        inputs = inputs_of(config)
        if config.pooling == "end":
            config = dataclasses.replace(config, end_token=int(inputs[0, 3]))
            inputs = inputs.at[1].set(inputs[0])
        params = random_params(config)
        found = apply(config, params, inputs)
        for number, one_input in enumerate(inputs):
            hidden, pooled = reference(config, params, one_input)
            np.testing.assert_allclose(found.last_hidden_state[number], hidden, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(found.pooled[number], pooled, rtol=1e-10, atol=1e-10)


def test_the_head_reads_what_is_pooled():
    config = encoder_config(**PRE_LN, num_classes=5)
    params = random_params(config)
    inputs = inputs_of(config)
    features = apply(config, params, inputs, return_features=True)
    expected = features.pooled @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply(config, params, inputs), expected, rtol=1e-5, atol=1e-5)


def test_two_heads_give_the_mean_of_their_logits():
    config = encoder_config(**PRE_LN, num_classes=5, distillation_token=True, distillation_head=True)
    params = random_params(config)
    inputs = inputs_of(config)
    hidden = apply(config, params, inputs, return_features=True).last_hidden_state
    heads = [params["head"], params["distillation_head"]]
    logits = [hidden[:, place] @ head["kernel"] + head["bias"] for place, head in enumerate(heads)]
    np.testing.assert_allclose(apply(config, params, inputs), sum(logits) / 2, rtol=1e-5, atol=1e-5)


def test_masked_patches_are_the_mask_token():
    """With all patches masked nothing of the image is seen, and with none all of it."""
    config = encoder_config(**PRE_LN, mask_token=True)
    params, inputs = random_params(config), inputs_of(config)
    all_masked = jnp.ones((2, config.num_patches), bool)
    first, second = (apply(config, params, factor * inputs, masked=all_masked).pooled for factor in (1, 2))
    np.testing.assert_array_equal(first, second)
    plain, none_masked = apply(config, params, inputs), apply(config, params, inputs, masked=~all_masked)
    np.testing.assert_array_equal(plain.pooled, none_masked.pooled)
    assert not np.allclose(plain.pooled, first)


def test_the_end_is_the_first_of_its_id_or_of_the_largest_or_the_start():
    tokens = jnp.asarray([[3, 7, 2, 7, 9], [1, 1, 1, 1, 1]])
    keys = {**PRE_LN, **MODELS["clip_text"], "max_positions": 5}
    for end_token, places in ((7, (1, 0)), (None, (4, 0))):
        config = encoder_config(**keys, end_token=end_token)
        found = apply(config, random_params(config), tokens)
        expected = found.last_hidden_state[jnp.arange(2), jnp.asarray(places)]
        np.testing.assert_array_equal(found.pooled, expected)


# Scales that start at 0, and two streams: the blocks are those of decoders.
QUICK = ("hybrid_rezero", "siamese_post_pre")


@pytest.mark.parametrize("scheme", others_are_long(hn.SCHEMES, QUICK))
def test_every_scheme_starts_and_has_gradients(scheme):
    config = encoder_config(**keys_of(scheme), num_classes=3, remat="full")
    model, inputs = hn.Encoder(config), inputs_of(config)

    def loss(params):
        return -jax.nn.log_softmax(model.apply({"params": params}, inputs))[:, 0].mean()

    @jax.jit
    def gradients_at_the_start(key):
        return jax.grad(loss)(model.init(key, inputs)["params"])

    gradients = gradients_at_the_start(jax.random.key(0))
    assert jax.tree.structure(gradients) == jax.tree.structure(abstract_params(config))
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
    reaches_the_head = float(jnp.abs(gradients["patch_embedding"]["kernel"]).max()) > 0
    # Where learned scales of branches start at 0, the class token has seen no patch yet; the scales learn first.
    begins_at_0 = config.placements[0].attention.layer_scale_init == 0
    assert reaches_the_head != begins_at_0
    if begins_at_0:
        assert float(jnp.abs(gradients["run_0"]["attention_layer_scale"]["scale"]).max()) > 0


@pytest.mark.parametrize(
    "shape", [pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.long), {"fsdp": 2, "tensor": 4}]
)
def test_eight_devices_equal_one(shape):
    """In float64: the gradient of a key's bias is zero but for rounding, which no tolerance in float32 would see."""
    with jax.enable_x64(True):
        config = encoder_config(**PRE_LN, **MODELS["dinov2"], num_classes=8, dtype="float64", param_dtype="float64")
        params, inputs = random_params(config), inputs_of(config, batch=8)

        def loss(params, inputs):
            return jnp.square(apply(config, params, inputs)).sum()

        alone = jax.jit(jax.value_and_grad(loss))(params, inputs)
        mesh = hn.make_mesh(shape)
        with hn.use_mesh(mesh):
            placed = jax.device_put(params, hn.tree_shardings(params, mesh))
            found = jax.jit(jax.value_and_grad(loss))(placed, inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, alone)


def test_every_leaf_has_logical_axes():
    keys = {"distillation_token": True, "distillation_head": True, "num_classes": 3, "register_tokens": 2}
    for more in (keys | {"mask_token": True}, MODELS["siglip"], MODELS["clip_text"]):
        config = encoder_config(**PRE_LN, **more)
        for path, leaf in jax.tree.leaves_with_path(abstract_params(config)):
            assert len(logical_axes(tuple(part.key for part in path), leaf.ndim)) == leaf.ndim


def test_bfloat16_stays_near():
    config = encoder_config(**PRE_LN, num_classes=5)
    params, inputs = random_params(config), inputs_of(config)
    expected = apply(config, params, inputs)
    found = apply(dataclasses.replace(config, dtype="bfloat16"), params, inputs)
    assert found.dtype == jnp.float32
    assert float(jnp.abs(found - expected).max()) < 0.1 * float(jnp.abs(expected).max())


def test_dropout_needs_a_key_and_changes_the_result():
    config = encoder_config(**PRE_LN, num_classes=5, dropout=0.5)
    params, inputs = random_params(config), inputs_of(config)
    dropped = apply(config, params, inputs, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(dropped, apply(config, params, inputs))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pooling": "class", "class_token": False}, r"model\.pooling=class: needs model\.class_token"),
        ({"pooling": "end"}, r"model\.pooling=end: only for model\.input=tokens"),
        ({"end_token": 3}, r"model\.end_token=3: only for model\.pooling=end"),
        ({"patch_size": (20, 20)}, r"model\.patch_size=.*larger than model\.image_size"),
        ({"image_size": (1, 2, 3)}, r"model\.image_size=.*\[height, width\]"),
        ({"max_positions": 5}, r"model\.max_positions=5: must be 9: 8 patches and 1 learned tokens"),
        ({"vocab_size": 5}, r"model\.vocab_size=5: only for model\.input=tokens"),
        (
            {"input": "tokens", "max_positions": 4, "image_size": 16},
            r"model\.image_size=.*only for model\.input=pixels",
        ),
        ({"tie_embeddings": True}, r"model\.tie_embeddings=true: an Encoder does not have it"),
        ({"distillation_head": True}, r"model\.distillation_head=true: needs model\.distillation_token"),
        ({"whole_outside": True}, r"model\.whole_outside=true: only for model\.norm=crmsnorm"),
        ({"norm_pooled_only": True, "scheme": "post"}, r"model\.norm_pooled_only=true: model\.scheme=post has no norm"),
        ({"num_classes": 3, "pooling": "none"}, r"model\.num_classes=3: needs something pooled"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(hn.ConfigError, match=message):
        encoder_config(**keys)


def test_wrong_inputs_are_refused():
    config = encoder_config(**PRE_LN)
    params, inputs = random_params(config), inputs_of(config)
    with pytest.raises(ValueError, match=r"pixels: shape \(2, 2, 13, 8\) must be \(batch, 13, 8, 2\)"):
        apply(config, params, jnp.moveaxis(inputs, 3, 1))
    with pytest.raises(ValueError, match="masked: the model has no mask token"):
        apply(config, params, inputs, masked=jnp.ones((2, config.num_patches), bool))
    text = encoder_config(**PRE_LN, **MODELS["clip_text"])
    with pytest.raises(ValueError, match=r"10 positions, but model\.max_positions=9"):
        apply(text, random_params(text), jnp.zeros((1, 10), jnp.int32))


def test_build_model_gives_what_fits():
    assert isinstance(hn.build_model(encoder_config()), hn.Encoder)
    assert isinstance(hn.build_model(hn.ModelConfig()), hn.Decoder)
