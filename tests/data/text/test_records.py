"""Which records a file of JSON holds, in whatever form and under whatever name."""

import gzip
import json

import pytest

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text import records
from hybridnorm_jax.data.text.sources import text_corpus

RECORDS = [{"text": f"text {number} ä", "url": 'a{["\\'} for number in range(7)]
EXPECTED = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"
NESTED = 20_000  # Python's own parser ends at a thousand


def texts(path):
    corpus = text_corpus("data.files", [str(path)], "text")
    return [document.text for file in corpus.files for document in corpus.documents(file)]


def refused(path) -> str:
    with pytest.raises(DataError) as error:
        texts(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "A.Json.GZ", "a.json.gz"])
def test_records_are_known_by_any_usual_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.lower().endswith("gz") else LINES)
    assert texts(tmp_path / name) == EXPECTED


@pytest.mark.parametrize("content", [LINES, json.dumps(RECORDS, ensure_ascii=False).encode()])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, content):
    (tmp_path / "a.json").write_bytes(BOM + content)
    assert texts(tmp_path / "a.json") == EXPECTED


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_of_records_is_read_record_by_record(size, indent):
    content = json.dumps(RECORDS, indent=indent).encode()
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    read = [records.record_fields(one.json.decode(), one.place, "text") for one in records.records("a.json", chunks)]
    assert [fields["text"] for fields in read] == EXPECTED


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "truncated"),
        (b'[{"text": "a"}, {"text": "b', "truncated"),
        (b'[{"text": "a"} {"text": "b"}]', "must stand ','"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "something follows"),
        (b'[{"text": "a"}, 3]', "record 2 of its array"),
        (b'[{"text": "a"}, {"body": "b"}]', "record 2 of its array"),
        (b"[]", "holds no text"),
        (b'{\n "text": "a"\n}\n', "several lines"),
    ],
)
def test_a_broken_array_is_named_with_the_place(tmp_path, content, right):
    (tmp_path / "a.json").write_bytes(content)
    assert right in refused(tmp_path / "a.json")


@pytest.mark.parametrize("other", ["9" * 5000, "[" * NESTED + "]" * NESTED, '{"a":' * NESTED + "1" + "}" * NESTED])
def test_an_unused_field_may_hold_what_python_does_not_parse(tmp_path, other):
    (tmp_path / "a.jsonl").write_text(f'{{"id": {other}, "text": "one \\u00e4"}}\n{{"text": "two", "id": {other}}}\n')
    assert texts(tmp_path / "a.jsonl") == ["one ä", "two"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("9" * 5000, "a number"),
        ("3", "a number"),
        ("[" * NESTED + "]" * NESTED, "a list"),
        ('{"a":' * NESTED + "1" + "}" * NESTED, "an object"),
        ("null", "null"),
        ("true", "true"),
        ("[]", "a list"),
        ("{}", "an object"),
    ],
)
def test_what_is_no_string_is_called_as_in_json(tmp_path, value, kind):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n')
    wrong = f"{tmp_path / 'a.jsonl'}:1: field 'text' (data.text_field) must hold a string, not {kind}"
    assert refused(tmp_path / "a.jsonl") == wrong
    (tmp_path / "a.jsonl").write_text(f'{{"text": {value}, "id": {"9" * 5000}}}\n')
    assert refused(tmp_path / "a.jsonl") == wrong
    if not value.startswith(("{", "[]")):  # which would be one array, without a record
        (tmp_path / "a.jsonl").write_text(f"{value}\n" * 2)
        wrong = f"1: the record is {kind}, but must be an object with the field 'text'"
        assert wrong in refused(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "meta",
    ["[" * 2000 + "}" * 2000, "[" * 2000 + "]" * 1999 + "}", "[" * 2000 + "a" + "]" * 2000, "[" * 2000 + ",]" * 2000],
)
def test_deep_brackets_must_match(tmp_path, meta):
    (tmp_path / "a.jsonl").write_text(f'{{"meta": {meta}, "text": "a"}}\n')
    assert "a.jsonl:1: not JSON (" in refused(tmp_path / "a.jsonl")


def test_a_long_record_may_not_be_deep(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_DEEP", 1 << 20)
    rest = '"text": "' + "a" * (2 << 20) + '"'
    (tmp_path / "a.jsonl").write_text('{"meta": ' + "[" * 5000 + "]" * 5000 + f", {rest}}}\n")
    assert "a.jsonl:1: nested too deeply; only a record of up to 1 MiB may be" in refused(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(f'{{"meta": {"9" * 5000}, {rest}}}\n')
    assert [len(text) for text in texts(tmp_path / "a.jsonl")] == [2 << 20]


def test_nesting_that_does_not_end_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": ' + "[" * 100_000 + ', "text": "a"}\n')
    assert "not JSON" in refused(tmp_path / "a.jsonl")


def test_a_record_without_end_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_RECORD_BYTES", 1 << 20)
    for content in (b'[{"text": "' + b"x" * (5 << 20), b'[{"text": "a", "b": [' + b"1," * (3 << 20)):
        (tmp_path / "a.json").write_bytes(content)
        assert "more than 1 MiB" in refused(tmp_path / "a.json")


@pytest.mark.parametrize("content", [LINES, LINES[: LINES.index(b"\n")], json.dumps(RECORDS).encode()])
def test_a_text_file_that_holds_records_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert "name it .jsonl" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ['{\n  "name": "x"\n}\n', "[1, 2]\n", "{curly} text\n", '{"a": 1}\nand prose\n', "["])
def test_other_text_may_hold_brackets(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("content", "right"),
    [
        ("grün".encode("utf-16"), "iconv"),
        ("plain words".encode("utf-16-le"), "UTF-16"),
        (b"PAR1" + bytes(9), "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\x00", "data.source=tokens"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, right):
    (tmp_path / "a.txt").write_bytes(content)
    assert right in refused(tmp_path / "a.txt")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"text")
    assert texts(tmp_path / "a.txt") == ["text"]


def test_files_with_byte_order_marks_may_be_joined(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((BOM + LINES) * 2 + BOM)
    assert texts(tmp_path / "a.jsonl") == EXPECTED * 2
    (tmp_path / "b.jsonl").write_bytes(BOM + LINES + BOM + b'{"text": "gr\xfcn"}\n')
    assert f"invalid UTF-8 at byte {len(BOM + LINES + BOM) + 12}" in refused(tmp_path / "b.jsonl")


@pytest.mark.parametrize("repeats", [1, 100_000])
def test_a_byte_order_mark_that_begins_a_line_is_no_text(tmp_path, repeats):
    """One inside a line joins two words and stays."""
    (tmp_path / "a.txt").write_bytes((BOM + b"first\n" + BOM + BOM + b"sec\xef\xbb\xbfond\n") * repeats)
    assert "".join(texts(tmp_path / "a.txt")) == "first\nsec\ufeffond\n" * repeats
