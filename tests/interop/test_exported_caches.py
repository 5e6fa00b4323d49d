"""What transformers does with our PyTorch code as it reads and writes text: caches, padding, outputs."""

import sys
import weakref

import numpy as np
import pytest
from exported_models import (
    KINDS,
    SOME,
    TOKENS,
    config_of,
    export,
    ids,
    in_torch,
    left_padded,
    logits_of,
    torch,
    transformers,
    written,
)

import hybridnorm_jax as hn
from hybridnorm_jax.generation.generate import generate


@pytest.mark.parametrize(
    "name", ["hybrid_star", "span", "experts", "learned_positions", "compressed_within", "dyt", "gated"]
)
def test_text_is_that_of_our_own_generation(exported, model_of, name):
    config, params, _ = exported(name)
    rows = [TOKENS[0, :7].tolist(), TOKENS[1, :3].tolist()]
    ours = [row.tolist() for row in generate(config, params, rows, max_new_tokens=8)]
    tokens, mask = left_padded(rows)
    assert written(model_of(name), tokens, attention_mask=mask) == ours


@pytest.mark.parametrize("name", SOME)
def test_a_static_cache_gives_the_same_text(model_of, name):
    model = model_of(name)
    rows = [TOKENS[0, :7].tolist(), TOKENS[1, :3].tolist()]
    tokens, mask = left_padded(rows)
    dynamic = written(model, tokens, attention_mask=mask)
    model.generation_config.disable_compile = True
    assert written(model, tokens, attention_mask=mask, cache_implementation="static") == dynamic
    assert written(model, tokens, attention_mask=mask, use_cache=False) == dynamic


@pytest.mark.parametrize("name", SOME)
def test_padding_on_the_left_changes_nothing(model_of, name):
    """Positions are counted without padding, and what stands there is seen by nobody."""
    model = model_of(name)
    tokens, mask = left_padded([TOKENS[0], TOKENS[1, :5]], pad=7)
    padded = logits_of(model, tokens, attention_mask=mask)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[1, -5:], logits_of(model, TOKENS[1:, :5])[0], rtol=0, atol=1e-5)
    other, _ = left_padded([TOKENS[0], TOKENS[1, :5]], pad=8)
    # Other padding goes to other experts, whose products then have other numbers of rows: some CPUs sum those in
    # another order. Without experts no bit may change.
    tolerance = 1e-5 if model.config.num_experts else 0
    unseen = logits_of(model, other, attention_mask=mask)[1, -5:]
    np.testing.assert_allclose(unseen, padded[1, -5:], rtol=0, atol=tolerance)
    np.testing.assert_allclose(padded[0], logits_of(model)[0], rtol=0, atol=1e-5)


def test_no_row_of_a_mask_is_empty(model_of):
    """On some devices a query that sees nothing is NaN, which the next layer's values would spread."""
    module = type(model_of("span")).__module__.replace("modeling_", "positions_")
    seen_keys = sys.modules[module].seen_keys
    _, attention_mask = left_padded([TOKENS[0], TOKENS[1, :5]])
    mask = seen_keys(attention_mask, 12, 0, None, attention_mask.device)
    assert mask.shape == (2, 1, 12, 12)
    assert mask.any(-1).all()
    assert not mask[1, 0, 7:, :7].any()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("cache", [transformers.DynamicCache, None])
def test_a_prompt_in_pieces_has_the_logits_of_the_whole(model_of, name, cache):
    model = model_of(name)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16) if cache is None else cache()
    whole = logits_of(model)
    pieces = [logits_of(model, TOKENS[:, a:b], past_key_values=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-5)


def test_a_cache_holds_the_kv_heads_alone(model_of):
    model = model_of("hybrid_star")
    output = model(ids(TOKENS))
    cache = output.cache if "cache" in output else output.past_key_values
    assert len(cache.layers) == 4
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(2, 2, 12, 8)}
    assert model(ids(TOKENS), use_cache=False).get("cache") is None


def test_embeddings_and_positions_may_be_given(model_of):
    model = model_of("span")
    embedded = model.get_input_embeddings()(ids(TOKENS))
    positions = torch.arange(12)[None]
    with torch.no_grad():
        given = model(inputs_embeds=embedded, position_ids=positions).logits.numpy()
    np.testing.assert_array_equal(given, logits_of(model))
    with pytest.raises(ValueError, match="give one of input_ids and inputs_embeds"):
        model(ids(TOKENS), inputs_embeds=embedded)


def test_outputs_are_those_of_transformers(model_of):
    model = model_of("peri")
    output = model(ids(TOKENS), output_hidden_states=True, logits_to_keep=3)
    assert output.logits.shape == (2, 3, 61)
    assert len(output.hidden_states) == 5
    np.testing.assert_array_equal(model.lm_head(output.hidden_states[-1])[:, -3:].detach(), output.logits.detach())
    loss, logits = model(ids(TOKENS), labels=ids(TOKENS), return_dict=False, use_cache=False)
    assert loss.shape == ()
    assert logits.shape == (2, 12, 61)
    labels = ids(TOKENS)
    labels[:, :-1] = -100
    last = torch.nn.functional.cross_entropy(logits[:, -2], labels[:, -1])
    torch.testing.assert_close(model(ids(TOKENS), labels=labels).loss, last)


def test_more_tokens_than_learned_positions_are_refused(model_of):
    model = model_of("learned_positions")
    with pytest.raises(ValueError, match="position 20, counted from 0, but max_position_embeddings=20"):
        model(ids(np.zeros((1, 21))))
    assert model.generate(ids(TOKENS), do_sample=False, max_new_tokens=9).shape == (2, 21)
    with pytest.raises(ValueError, match="position 20, counted from 0, but max_position_embeddings=20"):
        model.generate(ids(TOKENS), do_sample=False, max_new_tokens=10)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_cached_text_that_grows_beyond_the_length_of_longrope_is_refused(tmp_path, fresh_compiler, is_compiled):
    """There all its tokens are rotated anew, and a cache holds the old ones. Our own generation refuses it, too."""
    model = in_torch(export(tmp_path / "model", config_of("longrope", rope_original_length=8)).directory)
    keys = {"do_sample": False, "cache_implementation": "static" if is_compiled else None}
    if is_compiled:
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    # The last new token is not read, so that 8 tokens are.
    assert model.generate(ids(TOKENS[:, :5]), max_new_tokens=4, **keys).shape == (2, 9)
    with pytest.raises(ValueError, match=r"a text with a cache grows beyond 8 tokens \(rotary_original_length\)"):
        model.generate(ids(TOKENS[:, :5]), max_new_tokens=5, **keys)
    assert model.generate(ids(TOKENS[:, :9]), max_new_tokens=5, **keys).shape == (2, 14)
    if not is_compiled:
        cache = model(ids(TOKENS[:, :5])).past_key_values
        with pytest.raises(ValueError, match="grows beyond 8 tokens"):
            model(ids(TOKENS[:, 5:]), past_key_values=cache)
        model.generate(ids(TOKENS[:, :5]), max_new_tokens=5, use_cache=False)


def test_padding_takes_no_learned_position(model_of):
    model = model_of("learned_positions")
    tokens, mask = left_padded([np.zeros(2), TOKENS[0]])
    tokens, mask = np.pad(tokens, ((0, 0), (15, 0))), torch.nn.functional.pad(mask, (15, 0))
    padded = logits_of(model, tokens, attention_mask=mask)
    np.testing.assert_allclose(padded[1, -12:], logits_of(model, TOKENS[:1])[0], rtol=0, atol=1e-5)


def test_a_mask_of_the_new_tokens_alone_is_refused(model_of):
    """It would hide all tokens before them."""
    model = model_of("span")
    cache = model(ids(TOKENS[:, :8])).past_key_values
    with pytest.raises(ValueError, match="attention_mask is of 1 tokens, but there are 9 so far"):
        model(ids(TOKENS[:, 8:9]), past_key_values=cache, attention_mask=ids(np.ones((2, 1))))


def test_streams_are_kept_only_where_they_are_asked_for(model_of):
    """From the configuration, too. Those that nobody asked for would stay in memory until the last layer."""
    model, first, kept = model_of("span"), [], []
    model.model.layers[0].register_forward_hook(lambda module, inputs, streams: first.append(weakref.ref(streams[0])))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: kept.append(first[-1]() is not None))
    with torch.no_grad():
        assert model(ids(TOKENS)).hidden_states is None
        assert len(model(ids(TOKENS), output_hidden_states=True).hidden_states) == 5
        model.config.output_hidden_states = True
        assert len(model(ids(TOKENS)).hidden_states) == 5
    assert kept == [False, True, True]


def test_every_name_of_a_kind_is_used():
    assert set(SOME) - set(hn.SCHEMES) <= set(KINDS)
