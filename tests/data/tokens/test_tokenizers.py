"""Bytes and tokenizer.json."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, load_tokenizer


def byte_level(special=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["low lower lowest"] * 3, trainer)
    return tokenizer


def load(path, **keys):
    return load_tokenizer(DataSection(source="text", files=("x",), tokenizer=str(path), **keys))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.json"


def test_bytes_are_utf8_with_a_separator_after_them():
    tokenizer = load_tokenizer(DataSection())
    assert tokenizer.encode("aä").tolist() == [97, 0xC3, 0xA4]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator_id) == ("bytes", 257, 256)
    # What a model may emit: a separator, an id without a byte, half of a character.
    assert tokenizer.decode(np.array([97, 256, 300, 0xC3, 0xA4, 0xC3])) == "aä\ufffd"


def test_a_tokenizer_json_goes_there_and_back(path):
    byte_level().save(str(path))
    tokenizer = load(path)
    text = "lower grün\n\n  lowest"
    ids = tokenizer.encode(text)
    assert isinstance(ids, np.ndarray)
    assert tokenizer.decode(ids) == text
    assert 0 < len(ids) < len(text.encode())
    assert tokenizer.name == str(path)
    batch = tokenizer.encode_batch([text, "low"])
    np.testing.assert_array_equal(batch[0], ids)
    np.testing.assert_array_equal(batch[1], tokenizer.encode("low"))


def test_the_files_own_settings_do_not_touch_a_document(path):
    plain = byte_level()
    plain.save(str(path))
    expected = load(path).encode("low lower lowest low").tolist()
    plain.enable_truncation(2)
    plain.enable_padding(length=50)
    end = ("<|endoftext|>", plain.token_to_id("<|endoftext|>"))
    plain.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[end])
    plain.save(str(path))
    assert load(path).encode("low lower lowest low").tolist() == expected


def test_a_text_cannot_spell_the_separator(path):
    byte_level().save(str(path))
    tokenizer = load(path)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_text_cannot_spell_a_separator_that_is_not_special(path):
    tokenizer = byte_level(special=())
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=False)])
    tokenizer.save(str(path))
    loaded = load(path)
    for text in ("a<|endoftext|>b", "<|endoftext|>" * 3):
        ids = loaded.encode(text)
        assert loaded.separator_id not in ids
        assert loaded.decode(ids) == text
    assert "<|endoftext|>" not in loaded.decode([loaded.separator_id])


def test_a_text_cannot_spell_a_separator_that_is_a_word(path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    ids = load(path).encode("a </s> a").tolist()
    assert (ids[0], ids[-1]) == (0, 0)
    assert 1 not in ids
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>")).save(str(path))
    with pytest.raises(DataError, match="ends a document"):
        load(path).encode("x")


def test_chance_and_a_byte_order_mark_are_no_part_of_a_tokenizer(path):
    tokenizer = byte_level()
    expected = tokenizer.encode("low lower lowest").ids
    tokenizer.model.dropout = 0.9
    path.write_bytes(b"\xef\xbb\xbf" + tokenizer.to_str().encode())
    loaded = load(path)
    assert all(loaded.encode("low lower lowest").tolist() == expected for _ in range(5))


def test_the_vocabulary_reaches_to_the_largest_id(path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 90, "</s>": 3}, unk_token="a"))
    tokenizer.save(str(path))
    assert load(path).vocab_size == 91


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_the_usual_separators_are_found(path, separator):
    byte_level(["<pad>", separator]).save(str(path))
    assert load(path).separator_id == 1


def test_the_separator_can_be_named(path):
    byte_level(["</s>", "<sep>"]).save(str(path))
    assert load(path, separator="<sep>").separator_id == 1


def test_no_separator_is_an_error_that_names_the_key(path):
    byte_level(["<pad>"]).save(str(path))
    with pytest.raises(DataError, match=r"^data\.separator is not set") as error:
        load(path)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=r"^data\.separator=<sep>: "):
        load(path, separator="<sep>")


def test_token_files_bring_their_separators_along(path):
    byte_level(["<pad>"]).save(str(path))
    tokenizer = load_tokenizer(DataSection(source="tokens", files=("x",), tokenizer=str(path)))
    assert tokenizer.separator_id is None


def test_special_tokens_do_not_show_in_text(path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<extra>", special=True)])
    tokenizer.save(str(path))
    loaded = load(path)
    assert loaded.decode([*loaded.encode("low"), loaded.separator_id, loaded.vocab_size - 1]) == "low"


def test_the_fingerprint_follows_the_content(path):
    byte_level().save(str(path))
    before = load(path).fingerprint
    assert load(path).fingerprint == before
    byte_level(["<|endoftext|>", "<new>"]).save(str(path))
    assert load(path).fingerprint != before


def test_a_wrong_file_is_an_error_that_names_the_key(tmp_path, path):
    path.write_text(json.dumps({"version": "1.0"}))
    wrong = {
        "missing": (tmp_path / "missing.json", "tokenizer.json"),
        "no tokenizer": (path, "not a tokenizer.json"),
        "directory": (tmp_path, "a directory"),
    }
    for given, words in wrong.values():
        with pytest.raises(DataError) as error:
            load(given)
        message = str(error.value)
        assert message.startswith(f"data.tokenizer={given}: ")
        assert words in message
        assert "\n" not in message


def test_bytes_have_no_other_separator():
    with pytest.raises(DataError, match=r"data\.separator=</s>"):
        load_tokenizer(DataSection(separator="</s>"))
