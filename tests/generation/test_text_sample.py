"""The sample of text at the end of training: where it begins, and how it is shown."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data.dataset import Data, Source
from hybridnorm_jax.data.rows.windows import Windows
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.generation import text_sample
from hybridnorm_jax.generation.text_sample import check_prompt, decoded, printable

END = 256


class LettersOnly(ByteTokenizer):
    """Has no separator, and no token for a space."""

    separator_id = None

    def encode(self, text):
        return super().encode(text.replace(" ", ""))


def windows(*documents):
    tokens = np.array([token for text in documents for token in (*text.encode(), END)], np.int32)
    extent = Extent(tokens, name="memory", start=0, stop=len(tokens))
    return Windows(TokenStream((extent,), 257), seq_len=64, tail=True)


def data(*, held_out=None, tokenizer=None):
    return Data(
        sources={"": Source(windows("trained on this line\nand more\n"))},
        validation={} if held_out is None else {"validation": windows(*held_out)},
        tokenizer=ByteTokenizer() if tokenizer is None else tokenizer,
    )


def config(**train):
    default = RunConfig()
    model = dataclasses.replace(default.model, vocab_size=257)
    return dataclasses.replace(
        default, model=model, train=dataclasses.replace(default.train, seq_len=64, sample_tokens=9, **train)
    )


@pytest.fixture
def sampled(monkeypatch):
    """Makes a sample, with what `generate` was asked; the model answers " a<escape>b", ends the document, "c"."""

    def sample(config, data):
        asked = SimpleNamespace()

        def generate(model, params, prompts, **keys):
            asked.keys = keys
            (asked.prompt,) = prompts
            return [np.array([*b" a\x1bb\r", END, *b"c\n\n"], np.int32)]

        monkeypatch.setattr(text_sample, "generate", generate)
        asked.text = text_sample.text_sample(config, data, params=None)
        return asked

    return sample


def test_a_sample_goes_on_from_the_first_line_of_a_held_out_document(sampled):
    asked = sampled(config(), data(held_out=['"""\nThe second line of it.\nThe third.\n', "another document\n"]))
    # A line of three quotes says nothing: the prompt ends with the first line that makes it long enough.
    prompt = '"""\nThe second line of it.\n'
    assert bytes(asked.prompt[1:].tolist()).decode() == prompt
    assert asked.prompt[0] == END
    assert asked.text.splitlines() == [
        "Sample of text",
        "--- prompt: the beginning of the held-out set validation",
        '"""',
        "The second line of it.",
        "--- the model goes on: 9 tokens at temperature 0.8",
        " a�b�",
        "[end of document]",
        "c",
        "---",
    ]
    assert asked.keys["max_new_tokens"] == 9
    assert asked.keys["sampling"].temperature == 0.8


def test_a_short_document_is_the_whole_prompt(sampled):
    asked = sampled(config(), data(held_out=["short", "a document that is not read"]))
    assert asked.prompt.tolist() == [END, *b"short"]


def test_without_held_out_text_the_training_data_are_named(sampled):
    asked = sampled(config(), data())
    assert "--- prompt: the beginning of the training data, since nothing is held out" in asked.text
    assert "trained on this line" in asked.text


def test_a_prompt_of_ones_own(sampled):
    asked = sampled(config(sample_prompt="def f"), data(held_out=["held out"]))
    assert asked.prompt.tolist() == [END, *b"def f"]
    assert "--- prompt: train.sample_prompt\ndef f\n--- the model goes on" in asked.text
    asked = sampled(config(sample_prompt="x" * 100), data(held_out=["held out"]))
    assert "train.sample_prompt; the model reads its last 64 tokens\n" in asked.text
    asked = sampled(config(sample_prompt=""), data())
    assert asked.prompt.tolist() == [END]
    assert "--- prompt: none, a document begins" in asked.text


@pytest.mark.parametrize(
    ("keys", "begins"),
    [({}, [END]), ({"segment_ids": True}, []), ({"packing": "documents"}, []), ({"packing": "padded"}, [])],
)
def test_a_separator_begins_a_prompt_where_the_model_has_learned_one(sampled, keys, begins):
    of_run = dataclasses.replace(config(sample_prompt="a"), data=DataSection(**keys))
    assert sampled(of_run, data()).prompt.tolist() == [*begins, ord("a")]
    if not begins:
        with pytest.raises(ConfigError, match=r"^train\.sample_prompt='': it has no token, and this model has learned"):
            check_prompt(dataclasses.replace(config(sample_prompt=""), data=DataSection(**keys)), data())


def test_prompts_that_cannot_be_are_refused_before_training():
    check_prompt(config(sample_prompt="fine"), data())
    check_prompt(config(), Data({"": Source(windows("x"))}, {}, None))
    with pytest.raises(ConfigError, match=r"^train.sample_prompt=' ': it has no token, and the tokenizer has no sep"):
        check_prompt(config(sample_prompt=" "), data(tokenizer=LettersOnly()))
    with pytest.raises(ConfigError, match=r"^train.sample_prompt=a: data.tokenizer names no tokenizer"):
        check_prompt(config(sample_prompt="a"), Data({"": Source(windows("x"))}, {}, None))
    small = config(sample_prompt="z")
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=100))
    with pytest.raises(ConfigError, match=r"its token 122 does not fit model.vocab_size=100"):
        check_prompt(small, data(tokenizer=LettersOnly()))
    with pytest.raises(ConfigError, match=r"^train.sample_prompt=a: needs train.sample_tokens"):
        dataclasses.replace(config().train, sample_prompt="a", sample_tokens=0)


def test_a_sample_goes_on_past_the_window_and_never_reads_more_than_it(monkeypatch):
    """The stand-in counts upwards, as the text does."""
    asked = []

    def generate(model, params, prompts, *, max_new_tokens, seeds, **keys):
        (prompt,) = prompts
        asked.append((len(prompt), max_new_tokens, *seeds))
        return [np.arange(prompt[-1] + 1, prompt[-1] + 1 + max_new_tokens)]

    monkeypatch.setattr(text_sample, "generate", generate)
    for window in (1, 2, 7, 8):
        for length in (1, 5, 20):
            drawn = text_sample.go_on(None, None, np.arange(length), count=30, window=window, seed=3)
            np.testing.assert_array_equal(drawn, np.arange(length, length + 30))
            assert all(read + new - 1 <= window for read, new, _ in asked)
            assert [seed for _, _, seed in asked] == list(range(3, 3 + len(asked)))
            asked.clear()


def test_nothing_that_moves_the_cursor_is_printed():
    assert printable("\n\x1b[31mred\r\tend\x00é\n") == "�[31mred�\tend�é"
    assert (
        decoded(np.array([*b"a", END, END, *b"b"]), ByteTokenizer()) == "a\n[end of document]\n\n[end of document]\nb"
    )
