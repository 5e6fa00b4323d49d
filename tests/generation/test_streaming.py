"""Tokens that become text piece by piece."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import load_tokenizer
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.streaming import TextStream

TEXT = "naïve café: 10 €, 木 and 🌲🌲 end"


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    """A tokenizer.json whose tokens are single bytes and a few pairs, some of which are parts of two characters."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [("Ã", "©"), ("â", "Ĥ"), ("e", "n")]
    vocabulary = letters | {"".join(pair): 256 + number for number, pair in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(DataSection(tokenizer=str(file)))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer.json that writes a space before every word but the first."""
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(DataSection(tokenizer=str(file)))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A tokenizer.json as Llama's: words with a space before them, and the bytes of characters that it does not know.

    Of bytes that stand together its decoder makes U+FFFD, each of them, until the last character of them is whole.
    """
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [(piece, -2.0) for piece in ("▁", "▁and", "▁end", "▁caf", *"abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    file = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(DataSection(tokenizer=str(file)))


def _pieces(tokenizer, ids, sizes, stop=(), after=()):
    stream, ids = TextStream(tokenizer, stop, after=after), list(ids)
    pieces = []
    for size in sizes:
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*pieces, stream.push(ids), stream.finish()], stream


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["bytes", "byte_pairs", "fallback"])
def test_no_piece_holds_half_a_character_however_tokens_come(name, seed, byte_pairs, fallback):
    tokenizer = {"bytes": ByteTokenizer(), "byte_pairs": byte_pairs, "fallback": fallback}[name]
    sizes = [random.Random(seed).randint(0, 3) for _ in range(60)] if seed else [1] * 100
    pieces, _ = _pieces(tokenizer, tokenizer.encode(TEXT), sizes)
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_what_is_certain_is_not_held_back(byte_pairs):
    for tokenizer in (ByteTokenizer(), byte_pairs):
        stream = TextStream(tokenizer)
        ids = list(tokenizer.encode("ab€"))
        assert stream.push(ids[:2]) == "ab"
        assert stream.push(ids[2:-1]) == ""
        assert stream.push(ids[-1:]) == "€"


def test_bytes_that_are_no_text_become_the_replacement_character():
    bad = [*b"a", 0xFF, *b"b", 0xE2, 0x82]
    pieces, _ = _pieces(ByteTokenizer(), bad, [1] * 6)
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


def test_a_space_between_words_is_kept_where_a_text_would_begin_without_one(words):
    ids = words.encode("one two three two one")
    for sizes in ([1] * 5, [2, 2, 1], [0, 3, 0, 2]):
        pieces, _ = _pieces(words, ids, sizes)
        assert "".join(pieces) == words.decode(ids) == "one two three two one"


def test_a_text_that_goes_on_from_a_prompt_keeps_the_space_after_it(words, fallback):
    for tokenizer, text in ((words, "one two three two one"), (fallback, "10 € and 木 end")):
        ids = list(tokenizer.encode(text))
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut])
            if before.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # no prompt ends in half a character
            pieces, _ = _pieces(tokenizer, ids[cut:], [1] * len(ids), after=ids[:cut])
            assert before + "".join(pieces) == text


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_no_character_is_lost_where_the_known_tokens_begin_with_half_a_one(end, fallback):
    """Only the newest tokens of a prompt are known; here each is a byte, and they may begin inside a character."""
    _, *written = fallback.encode("€" * 9)  # without the space before the first word
    pieces, _ = _pieces(fallback, written, [1] * 40, after=fallback.encode("木" * 9 + end))
    assert "".join(pieces) == "€" * 9


@pytest.mark.parametrize("stop", [["bc", "abcd"], ["abcd", "bc"], ["c", "bc"], ["bcx", "abcdef", "d"]], ids=str)
def test_the_stop_string_that_is_complete_first_ends_the_text_however_tokens_come(stop):
    ids = ByteTokenizer().encode("xabcdef")
    texts = {"".join(_pieces(ByteTokenizer(), ids, [size] * 7, stop=stop)[0]) for size in range(1, 8)}
    expected = {"bc": "xa", "c": "xa", "bcx": "xabc"}
    assert texts == {next(text for name, text in expected.items() if name in stop)}


@pytest.mark.parametrize("sizes", [[], [1] * 40, [3] * 12, [7] * 6], ids=str)
def test_text_ends_before_the_first_stop_string_which_may_lie_across_tokens(sizes):
    ids = ByteTokenizer().encode("one\nt\n\nwo\n\n# end")
    pieces, stream = _pieces(ByteTokenizer(), ids, sizes, stop=["# e", "\n\n"])
    assert "".join(pieces) == "one\nt"
    assert stream.has_stopped


def test_the_beginning_of_a_stop_string_waits_until_it_is_none():
    stream = TextStream(ByteTokenizer(), ["</end>"])
    assert stream.push(b"a</e") == "a"
    assert stream.push(b"m></en") == "</em>"
    assert stream.finish() == "</en"
    assert not stream.has_stopped


def test_every_division_of_a_text_gives_the_same(byte_pairs):
    ids = list(byte_pairs.encode("aéa€a"))
    for cuts in itertools.combinations(range(1, len(ids)), 2):
        sizes = np.diff([0, *cuts]).tolist()
        pieces, _ = _pieces(byte_pairs, ids, sizes, stop=["€a"])
        assert "".join(pieces) == "aéa"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop: an empty string would end every text at once"):
        TextStream(ByteTokenizer(), ["x", ""])
