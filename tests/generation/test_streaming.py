"""Tokens as text, piece by piece: whole characters, and nothing of a stop string."""

import itertools
import string

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybridnorm_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.streaming import CONTEXT, MOST_KEPT, TextStream, without_controls

# Characters of one to four bytes, words with and without a space in front, a character that is U+FFFD itself.
TEXT = "Grüße, 世界! \N{GRINNING FACE}\N{GRINNING FACE}\n  a word, another\N{REPLACEMENT CHARACTER} é\n\nend"
CHUNKS = (1, 2, 3, 7, 1000)


def byte_level():
    """As GPT-2's: tokens of a few bytes, whatever characters they belong to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a word, another 世 end end"] * 3, trainer)
    return tokenizer


def byte_fallback():
    """As Llama's: words that begin with a space, the text's first space left out; other characters byte by byte."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [(piece, -2.0) for piece in ("▁", "▁a", "▁word", "▁another", "end", "Gr", *string.ascii_lowercase, ",")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "byte_level", "byte_fallback"])
def tokenizer(request):
    """One of three kinds."""
    if request.param == "bytes":
        return ByteTokenizer()
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback}[request.param]()
    return HuggingFaceTokenizer(request.param, made.to_str().encode(), "", needs_separator=True)


def pieces_of(tokenizer, tokens, size, **keys):
    """What a stream gives for tokens that come so many at a time."""
    stream = TextStream(tokenizer, **keys)
    pieces = [stream.feed(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    return [*pieces, stream.finish()], stream


def test_the_pieces_are_the_text_and_each_ends_in_a_whole_character(tokenizer):
    tokens = tokenizer.encode(TEXT).tolist()
    text = tokenizer.decode(tokens)
    assert text == TEXT
    for size in CHUNKS:
        pieces, stream = pieces_of(tokenizer, tokens, size)
        shown = list(itertools.accumulate(pieces))
        assert shown[-1] == TEXT
        assert all(TEXT.startswith(each) for each in shown)
        assert not stream.is_stopped
    # Nothing is kept back longer than needed: a letter comes with its token, a character with its last byte.
    pieces, _ = pieces_of(tokenizer, tokens, 1)
    for number in range(1, len(tokens) + 1):
        whole = tokenizer.decode(tokens[:number])
        assert len("".join(pieces[:number])) >= len(whole.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_text_goes_on_from_its_prompt(tokenizer):
    """A word's space, which decoders leave out at the beginning of a text, is there."""
    tokens = tokenizer.encode("a word, another").tolist()
    for prompt in range(1, len(tokens)):
        pieces, _ = pieces_of(tokenizer, tokens[prompt:], 2, after=tokens[:prompt])
        assert "".join(pieces) == "a word, another".removeprefix(tokenizer.decode(tokens[:prompt]))


def test_a_long_text_is_not_decoded_from_its_beginning_each_time(tokenizer, monkeypatch):
    tokens = tokenizer.encode(TEXT * 40).tolist()
    lengths = []
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    for size in (1, 5):
        pieces, _ = pieces_of(tokenizer, tokens, size)
        assert "".join(pieces) == TEXT * 40
    assert max(lengths) < MOST_KEPT + 2 * CONTEXT
    assert len(tokens) > 3 * MOST_KEPT


def test_bytes_that_are_no_character_are_shown_as_such_at_last():
    tokens = [*b"ok ", 0xFF, 0xE4, 0xB8, *b"x", 0xC3]
    pieces, _ = pieces_of(ByteTokenizer(), tokens, 1)
    assert "".join(pieces) == "ok \ufffd\ufffdx\ufffd"
    assert pieces[:5] == ["o", "k", " ", "", ""]
    many, _ = pieces_of(ByteTokenizer(), [0xFF] * 10, 1)
    assert "".join(many) == "\ufffd" * 10


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["another"], "Grüße, 世界! \N{GRINNING FACE}\N{GRINNING FACE}\n  a word, "),
        (["\n\n"], TEXT.partition("\n\n")[0]),
        (["界"], "Grüße, 世"),
        (["word", "a word, a"], "Grüße, 世界! \N{GRINNING FACE}\N{GRINNING FACE}\n  a "),
        (["never", "ends and more", "\n\n\n"], TEXT),
        (["Grüße"], ""),
        (["ß", "üß"], "Gr"),
    ],
    ids=["word", "newlines", "character", "first_complete", "never", "first", "together"],
)
def test_a_stop_string_ends_the_text_and_nothing_of_it_is_shown(stop, expected, tokenizer):
    tokens = tokenizer.encode(TEXT).tolist()
    for size in CHUNKS:
        pieces, stream = pieces_of(tokenizer, tokens, size, stop=stop)
        assert "".join(pieces) == expected
        assert all(expected.startswith(shown) for shown in itertools.accumulate(pieces))
        assert stream.is_stopped == (expected != TEXT)
        assert stream.feed(tokens) == "" or not stream.is_stopped


def test_what_might_become_a_stop_string_is_shown_once_it_cannot():
    stream = TextStream(ByteTokenizer(), stop=["aab"])
    assert [stream.feed([letter]) for letter in b"xaaab"] == ["x", "", "", "a", ""]
    assert stream.is_stopped
    stream = TextStream(ByteTokenizer(), stop=["aab", "b"])
    assert [stream.feed([letter]) for letter in b"aac"] == ["", "", "aac"]
    assert stream.feed(np.array([*b"aa"])) == ""
    assert stream.finish() == "aa"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match=r"^stop: a stop string must not be empty$"):
        TextStream(ByteTokenizer(), stop=["a", ""])


def test_nothing_that_moves_the_cursor_is_left():
    assert without_controls("\x1b[31mred\r\tend\x00é\n") == "\ufffd[31mred\ufffd\tend\ufffdé\n"
