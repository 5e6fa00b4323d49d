"""Tokens that a model writes: the same as without a cache, whatever stands beside them; and where they end."""

import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.generation import decoding
from hybridnorm_jax.generation.generate import SHORTEST, STRIDE_OF_A_LISTENER, rounded_up

VOCABULARY = 61
# Lengths on both sides of a bucket's end, and of different numbers of blocks of the cache.
LENGTHS = (1, 7, SHORTEST - 1, SHORTEST)
MODELS = {
    "rope": {"scheme": "hybrid"},
    "learned": {"scheme": "pre", "positions": "learned", "max_positions": SHORTEST + 40, "position_offset": 2},
    "experts": {"scheme": "span", "num_experts": 4, "experts_per_token": 2, "num_kv_heads": 4},
}


@pytest.fixture(scope="module")
def counting_model():
    """Parameters with which token t is followed by t + 1 with near certainty: no branch writes, the head is shifted."""
    config = hn.ModelConfig(scheme="pre", d_model=16, num_layers=1, num_heads=2, mlp_dim=8, vocab_size=16)
    params = hn.Decoder(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    for branch, name in (("attention", "out"), ("feed_forward", "down")):
        params["run_0"][branch][name]["kernel"] *= 0
    params["token_embedding"]["embedding"] = jnp.eye(16)
    params["head"]["kernel"] = 40 * jnp.roll(jnp.eye(16), 1, axis=1)
    return config, params


@pytest.fixture
def model(request, small_config, random_params):
    """(config, params) of one of MODELS."""
    config = small_config(**MODELS[request.param])
    return config, random_params(config)


def prompts(lengths=LENGTHS, seed=0):
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


@partial(jax.jit, static_argnames="config")
def all_logits(config, params, text):
    """Of one text, by a pass over all of it."""
    return hn.Decoder(config).apply({"params": params}, text[None])[0]


def without_cache(config, params, prompt, count, penalty=1.0):
    """The likeliest tokens, each by a pass over all tokens before it."""
    # Padding behind the tokens is not seen by them, and one length compiles once.
    text = np.zeros(config.max_positions or 2 * SHORTEST, np.int32)
    text[: len(prompt)] = prompt
    new = []
    for place in range(len(prompt), len(prompt) + count):
        logits = np.array(all_logits(config, params, text)[place - 1])
        came = np.unique(text[:place])
        logits[came] = np.where(logits[came] > 0, logits[came] / penalty, logits[came] * penalty)
        new.append(np.argmax(logits))
        if place < len(text):
            text[place] = new[-1]
    return new


# ---- The same as without a cache


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_unequal_prompts_go_on_as_each_would_alone_and_without_a_cache(model):
    config, params = model
    together = hn.generate(config, params, prompts(), max_new_tokens=20)
    for prompt, new in zip(prompts(), together, strict=True):
        np.testing.assert_array_equal(new, without_cache(config, params, prompt, 20))
    for prompt, new in list(zip(prompts(), together, strict=True))[:2]:
        (alone,) = hn.generate(config, params, [prompt], max_new_tokens=20)
        np.testing.assert_array_equal(new, alone)


def test_a_prompt_may_be_one_token_longer_than_a_bucket(small_config, random_params):
    config = small_config(scheme="hybrid_star")
    params = random_params(config)
    for length in (SHORTEST, SHORTEST + 1):
        (prompt,) = prompts([length])
        (new,) = hn.generate(config, params, [prompt], max_new_tokens=12)
        np.testing.assert_array_equal(new, without_cache(config, params, prompt, 12))


def test_bfloat16_says_what_its_own_pass_says(small_config, random_params):
    """The logits of what is written differ from the whole pass by roundings alone."""
    config = small_config(scheme="hybrid", dtype="bfloat16")
    params = random_params(config)
    (prompt,) = prompts([9])
    (new,) = hn.generate(config, params, [prompt], max_new_tokens=20)
    text = np.concatenate([prompt, new]).astype(np.int32)
    logits = np.asarray(all_logits(config, params, text)[len(prompt) - 1 : -1])
    # Rounding to bfloat16 errs by 2^-9 of a value. On the way to the logits the stream, whose errors add up in squares,
    # is rounded after each of 4 operations (attention's weights, its sum, the projection, the sum) in 2 sublayers of 3
    # layers. Both passes round, so that their difference is sqrt(2) times that; three standard deviations of it.
    tolerance = 3 * np.sqrt(2 * 4 * 2 * 3) * 2**-9 * np.abs(logits).max()
    lacking = logits.max(-1) - logits[np.arange(20), new]
    assert lacking.max() < tolerance
    assert tolerance < 0.1 * np.abs(logits).max()


# ---- Seeds, sampling, ends


@pytest.mark.parametrize("model", ["rope", "experts"], indirect=True)
def test_every_row_draws_by_its_own_seed_whatever_is_beside_it(model):
    config, params = model
    hot = hn.Sampling(temperature=1.5, top_k=40)
    both = hn.generate(config, params, prompts([5, 20]), max_new_tokens=15, sampling=hot, seeds=[7, 8])
    counted = hn.generate(config, params, prompts([5, 20]), max_new_tokens=15, sampling=hot, seeds=7)
    swapped = hn.generate(config, params, prompts([5, 20])[::-1], max_new_tokens=15, sampling=hot, seeds=[8, 7])
    (alone,) = hn.generate(config, params, prompts([5, 20])[1:], max_new_tokens=15, sampling=hot, seeds=8)
    np.testing.assert_array_equal(both, counted)
    np.testing.assert_array_equal(both, swapped[::-1])
    np.testing.assert_array_equal(both[1], alone)
    twice = hn.generate(config, params, prompts([5]) * 2, max_new_tokens=15, sampling=hot, seeds=[7, 9])
    np.testing.assert_array_equal(twice[0], both[0])
    assert twice[1].tolist() != twice[0].tolist()


def test_temperature_and_seed_decide_the_text(counting_model):
    config, params = counting_model

    def draw(seed, temperature):
        sampling = hn.Sampling(temperature=temperature)
        return hn.generate(config, params, [[0]], max_new_tokens=12, sampling=sampling, seeds=seed)[0].tolist()

    assert draw(0, 100) == draw(0, 100)
    assert draw(0, 100) != draw(1, 100)
    assert draw(0, 1e-30) == draw(1, 1e-30) == [*range(1, 13)]


def test_text_goes_on_past_any_length(counting_model):
    config, params = counting_model
    (new,) = hn.generate(config, params, [[3, 4, 5]], max_new_tokens=200)
    np.testing.assert_array_equal(new, np.arange(6, 206) % 16)


def test_every_sequence_ends_with_its_first_stop_id(counting_model):
    config, params = counting_model
    new = hn.generate(config, params, [[3], [8], [11]], max_new_tokens=10, stop_ids=[9, 12, 7])
    assert [row.tolist() for row in new] == [[4, 5, 6, 7], [9], [12]]
    (unstopped,) = hn.generate(config, params, [[13]], max_new_tokens=3, stop_ids=[9])
    assert unstopped.tolist() == [14, 15, 0]


def test_a_penalty_counts_the_prompt_and_what_was_written(small_config, random_params):
    config = small_config(scheme="hybrid")
    params = random_params(config)
    two = prompts([3, 20])
    new = hn.generate(config, params, two, max_new_tokens=20, sampling=hn.Sampling(repetition_penalty=1.5))
    expected = [without_cache(config, params, prompt, 20, penalty=1.5) for prompt in two]
    np.testing.assert_array_equal(new, expected)
    assert expected[0] != without_cache(config, params, two[0], 20)


def test_a_listener_hears_everything_and_can_end_it(counting_model):
    config, params = counting_model
    heard = [[], []]
    sizes = []

    def listen(new):
        for row, piece in zip(heard, new, strict=True):
            row.extend(piece.tolist())
        sizes.append([len(piece) for piece in new])
        return len(heard[0]) > 20

    new = hn.generate(config, params, [[0], [0, 1]], max_new_tokens=100, stop_ids=[5], on_tokens=lambda _: None)
    assert [row.tolist() for row in new] == [[1, 2, 3, 4, 5], [2, 3, 4, 5]]
    new = hn.generate(config, params, [[6], [3]], max_new_tokens=100, stop_ids=[5], on_tokens=listen)
    assert [row.tolist() for row in new] == heard == [[*range(7, 16), *range(6)], [4, 5]]
    assert sizes == [[1, 1], [STRIDE_OF_A_LISTENER, 1], [6, 0]]
    heard[:] = [[], []]
    new = hn.generate(config, params, [[6], [3]], max_new_tokens=100, on_tokens=listen)
    assert len(new[0]) == len(heard[0]) == 1 + 3 * STRIDE_OF_A_LISTENER


# ---- Compilations


def test_lengths_are_rounded_up_by_little():
    lengths = np.arange(1, 5000)
    added = np.array([rounded_up(int(length)) for length in lengths]) - lengths
    assert (added >= 0).all()
    assert (added < np.maximum(SHORTEST, lengths / 4)).all()
    assert len(set(added + lengths)) < 40


def test_a_bucket_is_compiled_once_and_a_longer_text_needs_no_more(counting_model, caplog):
    config, params = counting_model
    config = dataclasses.replace(config, rope_theta=1234.0)  # no other test's programs

    def compiled(**keys):
        before = decoding.read_prompts._cache_size(), decoding.write._cache_size()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            caplog.clear()
            hn.generate(config, params, **keys)
        names = [word for word in ("read_prompts", "write") if f"Compiling jit({word})" in caplog.text]
        after = decoding.read_prompts._cache_size(), decoding.write._cache_size()
        assert [new - old for old, new in zip(before, after, strict=True)] == [
            int(name in names) for name in ("read_prompts", "write")
        ]
        return names

    # A cache of 160 slots: prompts up to 32 tokens, and 97 to 128 more.
    assert compiled(prompts=[[1]], max_new_tokens=128) == ["read_prompts", "write"]
    assert compiled(prompts=[[1] * 32], max_new_tokens=128) == []
    assert compiled(prompts=[[1] * 20], max_new_tokens=100, on_tokens=lambda _: None, stop_ids=[]) == []
    assert compiled(prompts=[[1] * 33], max_new_tokens=96) == ["read_prompts"]
    assert compiled(prompts=[[1] * 32], max_new_tokens=129) == ["read_prompts", "write"]


# ---- What cannot be


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts": []}, r"^prompts: there are none"),
        ({"prompts": [[1], []]}, r"^prompts\[1\]: must be a list of at least one token; a document begins with"),
        ({"prompts": [1, 2]}, r"^prompts\[0\]: must be a list"),
        ({"prompts": [[1, 16]]}, r"^prompts\[0\]: token 16 is not in the vocabulary of 16$"),
        ({"prompts": [[-1]]}, r"^prompts\[0\]: token -1 is not in the vocabulary"),
        ({"stop_ids": [99]}, r"^stop_ids: token 99 is not in the vocabulary of 16$"),
        ({"max_new_tokens": 0}, r"^max_new_tokens=0: must be at least 1$"),
        ({"seeds": [1, 2]}, r"^seeds: 2 of them for 1 prompts; give one for each, or one for all$"),
        ({"seeds": -1}, r"^seeds: -1 must be between 0 and 4,294,967,295$"),
        ({"seeds": [2**32]}, r"^seeds: 4294967296 must be between 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(keys, message, counting_model):
    config, params = counting_model
    with pytest.raises(UserError, match=message):
        hn.generate(config, params, **({"prompts": [[1]], "max_new_tokens": 3} | keys))


def test_a_table_of_positions_has_an_end(small_config, random_params):
    config = small_config(scheme="pre", positions="learned", max_positions=12)
    params = random_params(config)
    (new,) = hn.generate(config, params, [[1] * 9], max_new_tokens=4)
    np.testing.assert_array_equal(new, without_cache(config, params, [1] * 9, 4))
    with pytest.raises(
        UserError, match=r"^max_new_tokens=5: after a prompt of 9 at most 4 fit model.max_positions=12$"
    ):
        hn.generate(config, params, [[1] * 9], max_new_tokens=5)
    with pytest.raises(UserError, match=r"^a prompt of 13 tokens: longer than model.max_positions=12; shorten it$"):
        hn.generate(config, params, [[1], [1] * 13], max_new_tokens=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1.0}, "^temperature=-1.0: must be at least 0 and at most 100$"),
        ({"temperature": float("nan")}, "^temperature=nan: must be at least 0"),
        ({"top_k": 0}, "^top_k=0: must be at least 1"),
        ({"top_p": 0.0}, "^top_p=0.0: must be above 0 and at most 1$"),
        ({"top_p": 1.5}, "^top_p=1.5: must be above 0"),
        ({"min_p": 2.0}, "^min_p=2.0: must be at least 0 and at most 1$"),
        ({"repetition_penalty": 0.0}, "^repetition_penalty=0.0: must be above 0"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be_is_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        hn.Sampling(**keys)
