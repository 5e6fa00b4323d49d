"""Generation with a cache of keys and values against the plain forward pass over the whole text."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import SCHEMES_OF_EACH_KIND, others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.generation import decoding
from hybridnorm_jax.generation import generate as module
from hybridnorm_jax.generation.generate import least_rows
from hybridnorm_jax.generation.ready_parameters import ready
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.cache import CACHE, Slots, empty_cache
from hybridnorm_jax.model.program_lengths import rounded_up
from tests.schemes import keys_of

# Of the compute dtype float32: sums in another order, over a few layers.
CLOSE = 1e-5

TINY = {"d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "vocab_size": 61}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
SCHEMES = {f"scheme {name}": keys_of(name) for name in hn.SCHEMES}
KINDS = {
    "experts pre": {"scheme": "pre", **EXPERTS},
    "experts hybrid_star": {"scheme": "hybrid_star", **EXPERTS},
    "a kv head for each head": {"scheme": "hybrid", "num_kv_heads": 4},
    "one kv head": {"scheme": "hybrid", "num_kv_heads": 1, "rotary_dim": 4},
    "learned positions": {"scheme": "pre", "norm": "layernorm", "positions": "learned", "max_positions": 24},
    "rules of scores": {
        **{"scheme": "hybrid", "windows": (2, 0), "attention_sinks": True, "score_cap": 3.0, "attention_scale": 0.8},
        **{"qkv_clip": 1.5, "attention_bias": True, "attention_output_bias": False, "attention_norm_per_head": True},
    },
    "rotations by layer": {"scheme": "pre", "rope_layers": (2, 0, 1), "second_rope_theta": 50.0, "windows": (3, 0)},
    "yarn": {
        **{"scheme": "pre", "rope_scaling": "yarn", "rope_factor": 4, "rope_original_length": 8},
        "rope_bounds": (1, 32),
    },
    "longrope": {
        **{"scheme": "pre", "rope_scaling": "longrope", "rope_factor": 4, "rope_original_length": 16},
        **{"rope_short_factors": (1, 2), "rope_long_factors": (3, 4)},
    },
    "alibi": {"scheme": "pre", "positions": "alibi", "alibi_scale": 0.5, "windows": (4, 0)},
    "alibi in bfloat16": {"scheme": "pre", "positions": "alibi", "alibi_bfloat16": True},
    "sinusoidal": {"scheme": "pre", "positions": "sinusoidal", "max_positions": 24, "position_offset": 2},
    "positions with an offset": {
        **{"scheme": "span", "tie_embeddings": True, "positions": "learned", "max_positions": 24},
        **{"position_offset": 2, "attention_bias": True, "mlp_bias": True},
    },
    **{
        f"norm {name}": {"scheme": "hybrid", "norm": name, "learned_embedding_scale": True}
        for name, kind in hn.NORM_KINDS.items()
        if kind.parameters
    },
}


def _kind(name, random_params):
    keys = TINY | (SCHEMES | KINDS)[name]
    config = hn.ModelConfig(**keys)
    return config, random_params(config)


@functools.cache
def _forward(config):
    return jax.jit(hn.Decoder(config).apply)


def _uncached(config, params, prompt, count, penalty=1.0, *, is_padded=True):
    """The likeliest token after the text so far, again and again, from whole forward passes.

    Args:
      penalty: of logits of tokens that came before, in the prompt or after it.
      is_padded: whether every pass is over as many tokens, with padding behind the text, so that one program does.
    """
    text = [int(token) for token in prompt]
    for _ in range(count):
        row = np.zeros((1, len(prompt) + count if is_padded else len(text)), np.int32)
        row[0, : len(text)] = text
        logits = np.array(_forward(config)({"params": params}, row)[0, len(text) - 1])
        came = np.unique(text)
        logits[came] = np.where(logits[came] > 0, logits[came] / penalty, logits[came] * penalty)
        text.append(int(np.argmax(logits)))
    return text[len(prompt) :]


def _cached_logits(config, params, tokens, *, read, first):
    """Logits of the positions from `read` - 1 on: the first `read` tokens are read at once, the others one by one.

    Args:
      first: of each row; the tokens before it are padding.
    """
    model, params = hn.Decoder(config, unrolled=True), ready(config, params)
    batch, width = tokens.shape
    positions = np.maximum(np.arange(width) - first[:, None], 0)
    ids = (np.arange(read) >= first[:, None]).astype(np.int32)

    @jax.jit
    def step(cache, tokens, positions, number, segment_ids=None):
        return model.apply(
            {"params": params, CACHE: cache},
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            slots=Slots(next=number, first=jnp.asarray(first)),
            mutable=[CACHE],
        )

    logits, state = step(
        empty_cache(config, batch=batch, slots=width), tokens[:, :read], positions[:, :read], 0, segment_ids=ids
    )
    rows = [logits[:, -1]]
    for place in range(read, width):
        here = slice(place, place + 1)
        logits, state = step(state[CACHE], tokens[:, here], positions[:, here], place)
        rows.append(logits[:, 0])
    return np.stack(rows, axis=1)


def assert_cached_is_whole(config, params, *, read, first):
    """Logits with the cache are those of the forward pass over each row's whole text; arguments as above."""
    tokens = np.random.default_rng(0).integers(0, 61, (2, 11)).astype(np.int32)
    ours = _cached_logits(config, params, tokens, read=read, first=first)
    moved = np.stack([np.roll(row, -start) for row, start in zip(tokens, first, strict=True)])
    whole = np.asarray(_forward(config)({"params": params}, moved))
    for row, start in enumerate(first):
        expected = whole[row, read - 1 - start : 11 - start]
        np.testing.assert_allclose(ours[row], expected, rtol=CLOSE, atol=CLOSE * np.abs(expected).max())


# Besides one of each kind of model: norms of keys, which stand before the cache, and norms and scales in the branches.
QUICK = [f"scheme {name}" for name in (*SCHEMES_OF_EACH_KIND, "qkc_post", "normformer_residual", "siamese_hybrid_pre")]


@pytest.mark.parametrize("kind", others_are_long(SCHEMES, QUICK))
def test_logits_with_the_cache_are_those_of_the_whole_text(kind, random_params):
    """Token by token from the first one on, so that the whole text and one step are all that is compiled."""
    assert_cached_is_whole(*_kind(kind, random_params), read=1, first=np.array([0, 0]))


# What norms and experts do to each token alone is the same with any cache, and what others have besides is there alone.
ALIKE = ["experts hybrid_star", "a kv head for each head", "norm dyt", "norm derf", "norm bhyt"]
ALIKE += ["learned positions", "yarn", "alibi"]


@pytest.mark.parametrize(
    "kind", others_are_long(["scheme hybrid_star", *KINDS], [kind for kind in KINDS if kind not in ALIKE])
)
def test_rows_of_unequal_prompts_do_not_see_the_padding(kind, random_params):
    """Six tokens are read at once. The second row has three; its positions begin after the padding on its left."""
    assert_cached_is_whole(*_kind(kind, random_params), read=6, first=np.array([0, 3]))


@pytest.mark.parametrize("form", others_are_long(["pre_rmsnorm", "pre_crmsnorm"], ["pre_crmsnorm"]))
def test_both_cheaper_forms_write_what_their_pre_ln_model_writes(form, random_params):
    config, params = _kind("learned positions", random_params)
    conversion = conversion_of(config, form, pad_to=8)
    prompt = np.arange(5)
    (original,) = hn.generate(config, params, [prompt], max_new_tokens=6)
    (ours,) = hn.generate(conversion.config, conversion.convert(params), [prompt], max_new_tokens=6)
    np.testing.assert_array_equal(ours, original)


WRITERS = ["scheme hybrid_star", "experts pre", "learned positions"]


@pytest.mark.parametrize("kind", others_are_long(WRITERS, ["experts pre"]))
def test_the_likeliest_text_is_that_without_a_cache(kind, random_params):
    config, params = _kind(kind, random_params)
    prompt = np.random.default_rng(1).integers(0, 61, 7)
    (ours,) = hn.generate(config, params, [prompt], max_new_tokens=9)
    assert ours.tolist() == _uncached(config, params, prompt, 9)


def test_longrope_is_exact_on_both_sides_of_its_length_and_refused_across_it(random_params):
    config, params = _kind("longrope", random_params)
    short, long = (np.random.default_rng(1).integers(0, 61, length) for length in (13, 17))
    # The last new token is not read, so that 16 tokens are.
    ours = hn.generate(config, params, [short, long], max_new_tokens=4)
    for prompt, text in zip((short, long), ours, strict=True):
        assert text.tolist() == _uncached(config, params, prompt, 4, is_padded=False)  # padding makes a text long
    with pytest.raises(hn.UserError, match=r"a prompt of 13 tokens and max_new_tokens=5: the text grows beyond 16"):
        hn.generate(config, params, [long, short], max_new_tokens=5)


def test_a_penalty_counts_the_prompt_and_what_was_written(random_params):
    config, params = _kind("scheme hybrid", random_params)
    prompts = [np.array([7, 8, 9]), np.random.default_rng(1).integers(0, 61, 20)]
    ours = hn.generate(config, params, prompts, max_new_tokens=12, sampling=hn.Sampling(repetition_penalty=1.5))
    expected = [_uncached(config, params, prompt, 12, penalty=1.5) for prompt in prompts]
    assert [row.tolist() for row in ours] == expected
    assert all(_uncached(config, params, prompt, 12) != row for prompt, row in zip(prompts, expected, strict=True))


def test_bfloat16_is_as_near_to_its_forward_pass_as_rounding_allows(random_params):
    config, params = _kind("scheme hybrid", random_params)
    config = dataclasses.replace(config, dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, 61, (1, 11)).astype(np.int32)
    ours = _cached_logits(config, params, tokens, read=6, first=np.array([0])).astype(np.float32)
    whole = np.asarray(_forward(config)({"params": params}, tokens)[0, 5:], np.float32)
    # 8 bits: each of a few roundings a layer is off by 2^-9 of its number, and they add up like random numbers.
    deviation = np.linalg.norm(ours[0] - whole) / np.linalg.norm(whole)
    assert deviation < np.sqrt(10 * config.num_layers) * 2**-9


def test_float64_writes_what_its_forward_pass_says(random_params):
    with jax.enable_x64(True):
        config = hn.ModelConfig(**TINY | {"scheme": "hybrid_star", "dtype": "float64", "param_dtype": "float64"})
        params = random_params(config)
        (ours,) = hn.generate(config, params, [np.arange(5)], max_new_tokens=4)
        assert ours.tolist() == _uncached(config, params, np.arange(5), 4)


@pytest.fixture(scope="module")
def counting_model():
    """Parameters with which token t is followed by t + 1 with near certainty: no branch writes, the head is shifted."""
    config = hn.ModelConfig(scheme="pre", d_model=16, num_layers=1, num_heads=2, mlp_dim=8, vocab_size=16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(config))
    for branch, name in (("attention", "out"), ("feed_forward", "down")):
        params["run_0"][branch][name]["kernel"] *= 0
    params["final_norm"]["scale"] = np.ones(16, np.float32)
    params["token_embedding"]["embedding"] = np.eye(16, dtype=np.float32)
    params["head"]["kernel"] = 40 * np.roll(np.eye(16, dtype=np.float32), 1, axis=1)
    return config, params


def test_each_row_goes_on_from_its_own_prompt_and_ends_with_its_stop_id(counting_model):
    config, params = counting_model
    rows = hn.generate(config, params, [[3], [9, 10, 11], [14]], max_new_tokens=5, stop_ids=[13, 2])
    assert [row.tolist() for row in rows] == [[4, 5, 6, 7, 8], [12, 13], [15, 0, 1, 2]]


def test_whole_numbers_of_any_type_are_taken(counting_model):
    config, params = counting_model
    numbers = {"max_new_tokens": np.int64(5), "stop_ids": {6, 9}, "seeds": jnp.asarray(2)}
    (row,) = hn.generate(config, params, jnp.asarray([[3]]), **numbers)
    assert row.tolist() == [4, 5, 6]


@pytest.mark.parametrize("length", [31, 32, 33])
def test_prompts_around_the_length_of_a_program(length, counting_model):
    config, params = counting_model
    (row,) = hn.generate(config, params, [np.arange(length) % 16], max_new_tokens=40)
    np.testing.assert_array_equal(row, np.arange(length, length + 40) % 16)


@pytest.mark.parametrize("kind", others_are_long(["scheme hybrid", "experts pre"], ["experts pre"]))
def test_a_row_does_not_depend_on_those_beside_it(kind, random_params):
    """Also where all of them are routed to the same experts: no token is dropped."""
    config, params = _kind(kind, random_params)
    drawn = hn.Sampling(temperature=1.0)
    ours, others = np.arange(4), [np.full(9, 7), np.arange(20, 26)]
    (alone,) = hn.generate(config, params, [ours], max_new_tokens=12, sampling=drawn, seeds=[5])
    beside = hn.generate(config, params, [ours, *others], max_new_tokens=12, sampling=drawn, seeds=[5, 6, 7])
    np.testing.assert_array_equal(beside[0], alone)
    moved = hn.generate(config, params, [*others, ours], max_new_tokens=12, sampling=drawn, seeds=[6, 7, 5])
    np.testing.assert_array_equal(moved[2], alone)


def test_seeds_decide_what_is_drawn(counting_model):
    config, params = counting_model
    drawn = hn.Sampling(temperature=100.0)

    def draw(seeds):
        rows = hn.generate(config, params, [[0], [0]], max_new_tokens=9, sampling=drawn, seeds=seeds)
        return [row.tolist() for row in rows]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    first, second = draw(3)
    assert first != second
    assert draw([8, 8])[0] == draw([8, 8])[1]


def test_the_caller_sees_all_tokens_in_order_and_can_end_it(counting_model):
    config, params = counting_model
    seen = [[], []]

    def read(new):
        for row, tokens in zip(seen, new, strict=True):
            row.extend(tokens.tolist())
        return len(seen[0]) > 40

    rows = hn.generate(config, params, [[0], [5]], max_new_tokens=200, stop_ids=[7], on_tokens=lambda new: read(new))
    assert seen == [row.tolist() for row in rows] == [[1, 2, 3, 4, 5, 6, 7], [6, 7]]
    seen = [[]]
    (row,) = hn.generate(config, params, [[0]], max_new_tokens=200, on_tokens=read)
    assert seen == [row.tolist()]
    assert 40 < len(row) < 200


def test_programs_are_compiled_for_rounded_lengths_and_not_as_the_text_grows(counting_model):
    config, params = counting_model
    decoding.read_prompts.clear_cache()
    decoding.write.clear_cache()

    def compiled():
        return decoding.read_prompts._cache_size(), decoding.write._cache_size()

    hn.generate(config, params, [np.arange(5)], max_new_tokens=90)
    assert compiled() == (1, 1)
    hn.generate(config, params, [np.arange(9)], max_new_tokens=70)  # as many slots
    assert compiled() == (1, 1)
    hn.generate(config, params, [np.arange(40) % 16], max_new_tokens=90)
    assert compiled() == (2, 2)


def test_a_rounded_length_is_at_most_a_quarter_more():
    for length in range(128, 5000, 7):
        assert length <= rounded_up(length) <= 1.25 * length
    assert len({rounded_up(length) for length in range(1, 4097)}) < 30


def test_the_cache_has_the_numbers_of_its_formula_and_no_more():
    config = hn.ModelConfig(**TINY | {"scheme": "hybrid_star", "dtype": "bfloat16"})
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, batch=3, slots=40)))
    sizes = {"batch": 3, "slots": 40, "kv heads": 2, "head_dim": 4, "k and v": 2, "layers": 3}
    assert sum(leaf.size for leaf in leaves) == math.prod(sizes.values())
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts": []}, "prompts: there are none"),
        ({"prompts": [[]]}, r"prompts\[0\]: must be a list of at least one token"),
        ({"prompts": [[1], [16]]}, r"prompts\[1\]: token 16 is not in the vocabulary of 16"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: token -1 is not in"),
        ({"prompts": [[1]], "stop_ids": [99]}, "stop_ids: token 99 is not in"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"prompts": [[1]], "max_new_tokens": 10**12}, "max_new_tokens=1000000000000: must be at least 1 and at most"),
        ({"prompts": [[1]], "seeds": [1, 2]}, "seeds: 2 of them for 1 prompts"),
        ({"prompts": [[1]], "seeds": -1}, "seed -1: must be between 0 and 4,294,967,295"),
        ({"prompts": [[1]], "seeds": [1 << 70]}, "seed 1180591620717411303424: must be between 0"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: must be whole numbers"),
        ({"prompts": [[[1], [2, 3]]]}, r"prompts\[0\]: must be a list of whole numbers"),
        ({"prompts": [[1]], "max_new_tokens": 1.5}, "max_new_tokens=1.5: must be a whole number"),
        ({"prompts": [[1]], "stop_ids": [1.5]}, "stop_ids: must be whole numbers"),
        ({"prompts": [[1]], "stop_ids": [1 << 70]}, "stop_ids: must be whole numbers"),
        ({"prompts": [[1]], "seeds": [1.5]}, "seed=1.5: must be a whole number"),
        ({"prompts": [[1]], "seeds": None}, "seed=None: must be a whole number"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_computed(keys, message, counting_model):
    config, _ = counting_model
    arguments = {"max_new_tokens": 4} | keys
    with pytest.raises(hn.UserError, match=message) as error:
        hn.generate(config, None, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reason", ["RESOURCE_EXHAUSTED: Out of memory allocating 224930530384 bytes.", "INTERNAL: x"])
def test_prompts_for_which_there_is_no_memory_are_refused_in_one_line(reason, counting_model, monkeypatch):
    """What another error says is not hidden."""

    def read_prompts(*_, **keys):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr(module, "read_prompts", read_prompts)
    refused = (hn.UserError, "prompts: 2 of up to 5 tokens need more memory than a device has; shorten them")
    error, message = refused if "RESOURCE" in reason else (jax.errors.JaxRuntimeError, "INTERNAL: x")
    with pytest.raises(error, match=message):
        hn.generate(*counting_model, [[1], np.arange(5)], max_new_tokens=3)


def test_a_text_longer_than_learned_positions_is_refused():
    config = hn.ModelConfig(**TINY | {"positions": "learned", "max_positions": 24})
    with pytest.raises(hn.UserError, match=r"a prompt of 20 tokens and max_new_tokens=6 do not fit model\.max_pos"):
        hn.generate(config, None, [np.arange(20)], max_new_tokens=6)


def test_one_sequence_on_a_gpu_has_an_empty_one_beside_it(small_config):
    """See least_rows. With experts it would read more of these."""
    gpu, cpu = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")
    assert [least_rows(small_config(), device) for device in (gpu, cpu)] == [2, 1]
    assert least_rows(small_config(num_experts=4, experts_per_token=2), gpu) == 1


def test_an_empty_sequence_changes_nothing(counting_model, monkeypatch):
    config, params = counting_model
    (alone,) = hn.generate(config, params, [np.arange(5)], max_new_tokens=6)
    monkeypatch.setattr(module, "least_rows", lambda config, device: 2)
    (beside,) = hn.generate(config, params, [np.arange(5)], max_new_tokens=6)
    np.testing.assert_array_equal(alone, beside)


def test_a_cache_that_no_device_can_hold_is_refused(counting_model, monkeypatch):
    """Otherwise the machine swaps, or the program is killed."""
    config, params = counting_model
    right = r"max_new_tokens=1000000: the keys and values of so many need \d+\.\d GiB of a device, which has 0\.1 GiB"
    monkeypatch.setattr(module, "room_of", lambda device: 2**27)
    with pytest.raises(hn.UserError, match=right):
        hn.generate(config, params, [np.arange(5)] * 100, max_new_tokens=1_000_000)
