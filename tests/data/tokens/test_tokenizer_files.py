"""The files of a tokenizer that an export holds give the ids that the run was trained on."""

import json

import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.tokens.tokenizer_files import TOKENIZER, byte_tokenizer_json, tokenizer_files
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer, load_tokenizer

TEXTS = [
    "",
    "def f(x):\n\treturn x  # two  spaces, trailing ",
    " leading",
    "Grüße, 世界 \U0001f600 e\u0301",
    "".join(map(chr, range(256))),
    "\r\n\x00\x7f",
    "it's 'quoted' 123",
]


@pytest.fixture
def as_file(tmp_path):
    """The byte tokenizer, read back from its tokenizer.json by our own code."""
    (tmp_path / TOKENIZER).write_text(json.dumps(byte_tokenizer_json(), ensure_ascii=False), encoding="utf-8")
    return load_tokenizer(DataSection(tokenizer=str(tmp_path / TOKENIZER)))


def test_the_byte_tokenizer_as_a_file_has_the_same_ids(as_file):
    ours = ByteTokenizer()
    for text in TEXTS:
        assert as_file.encode(text).tolist() == ours.encode(text).tolist() == list(text.encode())
        assert as_file.decode(as_file.encode(text)) == text
    assert (as_file.vocab_size, as_file.separator_id, as_file.separator) == (257, 256, "<|endoftext|>")
    for broken in ([0xC3], [0xE4, 0xB8], [0xFF, 65], [65, 0xF0, 0x9F, 0x98, 66], list(range(128, 256))):
        assert as_file.decode(broken) == ours.decode(broken)


def test_transformers_reads_the_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    data = DataSection()
    for name, content in tokenizer_files(data, load_tokenizer(data), longest=64).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|endoftext|>a")["input_ids"] == [256, 97]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {256}
    assert (len(tokenizer), tokenizer.model_max_length) == (257, 64)
    padded = tokenizer(["a", "abc"], padding=True)
    assert padded["input_ids"] == [[256, 256, 97], [97, 98, 99]]
    assert padded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXTS[3])["input_ids"] == list(TEXTS[3].encode())


def test_what_training_leaves_out_of_a_tokenizer_is_left_out(tmp_path):
    """A beginning for every text, merges by chance, and a length: a model that was exported never saw any of them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer_json()))
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator([text * 9 for text in TEXTS], trainer)
    tokenizer.model.dropout = 0.9
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "mine.json"))
    data = DataSection(tokenizer=str(tmp_path / "mine.json"))
    ours = load_tokenizer(data)
    for name, content in tokenizer_files(data, ours, longest=None).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    as_file = load_tokenizer(DataSection(tokenizer=str(tmp_path / TOKENIZER)))
    assert as_file.encode(TEXTS[1]).tolist() == ours.encode(TEXTS[1]).tolist()


def test_another_tokenizer_is_copied_as_it_is(tmp_path):
    document = byte_tokenizer_json()
    document["added_tokens"][0]["content"] = "</s>"
    content = json.dumps(document).encode() + b"\n \n"
    (tmp_path / "mine.json").write_bytes(content)
    data = DataSection(tokenizer=str(tmp_path / "mine.json"))
    files = tokenizer_files(data, load_tokenizer(data), longest=None)
    assert files[TOKENIZER] == content
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["eos_token"] == "</s>"
    assert "model_max_length" not in settings
