"""TFRecord and ArrayRecord files of tf.train.Examples, as text and as token ids.

The files are written byte by byte as TensorFlow's documentation says, with an encoder and a checksum of their own.
"""

import numpy as np
import pytest
from etils import epath
from written_tokens import example, tfrecord

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.text.examples import record_format
from hybridnorm_jax.data.text.sources import text_corpus

pytest.importorskip("google_crc32c")


def write(folder, name, records):
    path = epath.Path(folder / name)
    if record_format(name) == "tfrecord":
        path.write_bytes(tfrecord(records))
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:2")
        for record in records:
            writer.write(record)
        writer.close()
    return path


NAMES = ["a.tfrecord", "a.tfrecord-00000-of-00002", "a.array_record", "a.array_record-00001-of-00002"]
TEXTS = ["one", "zwei ä", "three\n"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_read(tmp_path, name):
    path = write(tmp_path, name, [example(text=text, score=0.5, lang="en" if number else "de", extra=[1, 2])
                                  for number, text in enumerate(TEXTS)])  # fmt: skip
    corpus = text_corpus("data.files", [str(path)], "text")
    assert [document.text for document in corpus.documents(corpus.files[0])] == TEXTS


def test_names_say_the_format():
    assert [record_format(name) for name in NAMES] == ["tfrecord"] * 2 + ["array_record"] * 2
    assert [record_format(name) for name in ("a.arrayrecord", "a.tfrecords", "a.TFRecord")] == [
        "array_record",
        "tfrecord",
        "tfrecord",
    ]
    assert [record_format(name) for name in ("a.txt", "tfrecord", "a.tfrecord.json", "a.tfrecord-1")] == [None] * 4


def section(path, tmp_path, **settings):
    base = {"source": "tokens", "files": (str(path),), "text_field": "ids", "cache_dir": str(tmp_path / "cache")}
    return DataSection(**(base | {"validation_fraction": 0.0} | settings))


IDS = [[1, 2, 3], [4, 70_000], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize("name", [*NAMES, "a.jsonl"])
@pytest.mark.parametrize("separator", [None, 0])
def test_ids_are_read_as_documents(tmp_path, name, separator):
    ends = [] if separator is None else [separator]
    # The second record brings its separator.
    records = [[*ids, *ends] if number == 1 else ids for number, ids in enumerate(IDS)]
    if name == "a.jsonl":
        path = tmp_path / name
        path.write_text("\n".join(f'{{"ids": {ids}}}' for ids in records))
    else:
        path = write(tmp_path, name, [example(ids=ids) for ids in records])
    data = open_data(section(path, tmp_path, separator_id=separator), seq_len=4, vocab_size=80_000)
    expected = [token for ids in IDS for token in [*ids, *ends]]
    assert data.train.beginning(100).tolist() == expected
    packed = section(path, tmp_path, separator_id=separator, packing="padded")
    rows = open_data(packed, seq_len=6, vocab_size=80_000).train
    firsts = {(int(rows[index]["tokens"][0]), int(rows[index]["targets"][0])) for index in range(len(rows))}
    assert firsts == {(1, 2), (4, 70_000), (5, 6), *((9, one) for one in ends)}


def test_ids_are_held_out_by_record_and_a_set_is_read_whole(tmp_path):
    path = write(tmp_path, "a.tfrecord", [example(ids=[number, 1, 2]) for number in range(50)])
    other = write(tmp_path, "b.tfrecord", [example(ids=[number, 3]) for number in range(5)])
    settings = {"validation_fraction": 0.3, "separator_id": 99, "validation": {"other": (str(other),)}}
    data = open_data(section(path, tmp_path, **settings), seq_len=4, vocab_size=100)
    held_out = data.validation["validation"].num_tokens
    assert data.train.num_tokens + held_out == 50 * 4
    assert held_out % 4 == 0
    assert 0 < held_out < 120
    assert data.validation["other"].num_tokens == 5 * 3


def damaged(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, r"a\.tfrecord: record 1: the checksum of its length is wrong: no TFRecord file"),
        (9, r"record 1: the checksum of its length is wrong"),
        (20, r"record 1: its checksum is wrong: the file is damaged"),
        (-1, r"record 3: its checksum is wrong"),
    ],
)
def test_a_changed_byte_of_a_tfrecord_is_found(tmp_path, place, message):
    path = write(tmp_path, "a.tfrecord", [example(text=text) for text in TEXTS])
    damaged(path, place)
    corpus = text_corpus("data.files", [str(path)], "text")
    with pytest.raises(DataError, match=message):
        list(corpus.documents(corpus.files[0]))


def test_a_truncated_tfrecord_is_found(tmp_path):
    path = write(tmp_path, "a.tfrecord", [example(text=text) for text in TEXTS])
    content = path.read_bytes()
    for length in (5, 14, len(content) - 1):
        path.write_bytes(content[:length])
        corpus = text_corpus("data.files", [str(path)], "text")
        with pytest.raises(DataError, match="ends inside a record"):
            list(corpus.documents(corpus.files[0]))


def test_a_damaged_or_truncated_array_record_is_found(tmp_path):
    path = write(tmp_path, "a.array_record", [example(text="x" * 100 + str(number)) for number in range(2000)])
    content = path.read_bytes()
    damaged(path, len(content) // 4)
    corpus = text_corpus("data.files", [str(path)], "text")
    with pytest.raises(DataError, match=r"a\.array_record: damaged"):
        list(corpus.documents(corpus.files[0]))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="no ArrayRecord file, or truncated"):
        list(corpus.documents(corpus.files[0]))


def test_what_is_no_example_or_has_no_ids_is_refused(tmp_path):
    path = write(tmp_path, "a.tfrecord", [b"\xff\xff"])
    with pytest.raises(DataError, match=r"record 1: no tf\.train\.Example"):
        open_data(section(path, tmp_path), seq_len=2, vocab_size=10)
    for name, content, message in (
        ("b", example(text="words"), "no field 'ids'.*; it has: text"),
        ("c", example(ids="words"), "must hold a list of token ids"),
        ("d", example(ids=[3, 10]), r"record 1: 10 is outside model\.vocab_size=10"),
        ("e", example(ids=[3, -1]), r"record 1: -1 is outside"),
    ):
        path = write(tmp_path, f"{name}.tfrecord", [content])
        with pytest.raises(DataError, match=message):
            open_data(section(path, tmp_path), seq_len=2, vocab_size=10)
    np.save(tmp_path / "ids.npy", np.arange(100))
    both = (str(path), str(tmp_path / "ids.npy"))
    with pytest.raises(DataError, match="name files of one kind"):
        open_data(section(path, tmp_path, files=both), seq_len=2, vocab_size=200)


def test_a_field_in_a_field_that_is_null_is_there(tmp_path):
    path = epath.Path(tmp_path / "a.jsonl")
    path.write_text('{"document": {"ids": null}}\n')
    with pytest.raises(DataError, match=r"'document\.ids' .* must hold a list of token ids"):
        open_data(section(path, tmp_path, text_field="document.ids"), seq_len=2, vocab_size=10)
    path.write_text('{"document": {"tokens": [1]}}\n')
    with pytest.raises(DataError, match=r"no field 'document\.ids'"):
        open_data(section(path, tmp_path, text_field="document.ids"), seq_len=2, vocab_size=10)
