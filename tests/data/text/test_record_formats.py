"""Every format of records gives the same documents, and so the same windows; what is wrong in one is named."""

import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import zstandard

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.mixture_section import SourceSection
from hybridnorm_jax.config.record_filter import parse_conditions
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.text import tables
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.errors import ConfigError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")

# The whole zoo of what one text may be: long, short, several lines, a zero byte, none.
ROWS = [
    {
        "text": f"Text {number}, grün.\n" * (1 + number % 7 * 40),
        "language": ("en", "de")[number % 2],
        "score": number / 60,
    }
    for number in range(60)
] + [{"text": "", "language": "en", "score": None}, {"text": "a\x00b", "language": None, "score": 1.0}]
TEXTS = [row["text"] for row in ROWS if row["text"]]


def tar(rows, *, style="txt", form=tarfile.PAX_FORMAT) -> bytes:
    """A WebDataset shard: texts as .txt beside .json, or as .json alone; another file between is no text."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for number, row in enumerate(rows):
            key = f"{'long/' * 40}{number:06}"
            meta = dict(row)
            if style == "txt" and "\x00" not in row["text"]:  # a text file has no zero byte, and JSON may
                del meta["text"]
                add(f"{key}.txt", row["text"].encode())
                add(f"._{number}.txt", b"\x00\x05\x16\x07")
            add(f"{key}.json", json.dumps(meta).encode())
            add(f"{key}.jpg", b"\xff\xd8" * 300)
    return stream.getvalue()


def saved_dataset(directory, table, rows_of_shard=25):
    """As Dataset.save_to_disk of `datasets` writes it: streams of Arrow, and the order in state.json."""
    directory.mkdir()
    names = []
    for number, start in enumerate(range(0, table.num_rows, rows_of_shard)):
        # Their names do not sort as they are ordered.
        names.append(f"data-{9 - number}.arrow")
        with pyarrow.ipc.new_stream(str(directory / names[-1]), table.schema) as writer:
            writer.write_table(table.slice(start, rows_of_shard), max_chunksize=10)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text("{}")


def _write(directory, form):
    """Write the rows in a format; returns what data.files names."""
    table = pyarrow.Table.from_pylist(ROWS)
    path = directory / f"data.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    match form:
        case "jsonl":
            path.write_bytes(lines)
        case "JSONL.GZ":
            path.write_bytes(gzip.compress(lines))
        case "json":
            path.write_text(json.dumps(ROWS, indent=1))
        case "parquet":
            parquet.write_table(table, path, row_group_size=7)
        case "dictionary.parquet":
            parquet.write_table(table, path, compression="zstd", use_dictionary=["text"], data_page_version="2.0")
        case "large.parquet":
            large = pyarrow.schema(
                [("text", pyarrow.large_string()), ("language", pyarrow.string()), ("score", pyarrow.float64())]
            )
            parquet.write_table(table.cast(large), path)
        case "arrow":
            with pyarrow.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=11)
        case "feather":
            feather.write_feather(table, str(path), compression="lz4")
        case "stream.arrow":
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=11)
        case "tar":
            path.write_bytes(tar(ROWS))
        case "gnu.tar":
            path.write_bytes(tar(ROWS, form=tarfile.GNU_FORMAT))
        case "json.tar.gz":
            path.write_bytes(gzip.compress(tar(ROWS, style="json")))
        case "joined.tzst":
            half = len(ROWS) // 2
            path.write_bytes(zstandard.compress(tar(ROWS[:half]) + tar(ROWS[half:])))
        case "dataset":
            saved_dataset(path, table)
        case _:
            raise ValueError(form)
    return str(path)


FORMATS = [
    "jsonl",
    "JSONL.GZ",
    "json",
    "parquet",
    "dictionary.parquet",
    "large.parquet",
    "arrow",
    "feather",
    "stream.arrow",
    "tar",
    "gnu.tar",
    "json.tar.gz",
    "joined.tzst",
    "dataset",
]


def windows(section) -> list[np.ndarray]:
    data = open_data(section, seq_len=64, vocab_size=257, progress=False)
    every = [data.train, *data.validation.values()]
    return [array for part in every for index in range(len(part)) for array in part[index].values()]


def texts(path, *filters) -> list[str]:
    corpus = text_corpus("data.files", [str(path)], "text", parse_conditions(filters))
    return [document.text for file in corpus.files for document in corpus.documents(file)]


def refused(path, *filters) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        texts(path, *filters)
    assert "\n" not in str(error.value)
    return str(error.value)


def outcome(path) -> str:
    """What is said of a file; "" where it is read."""
    try:
        texts(path)
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Windows of the rows as JSON lines."""
    directory = tmp_path_factory.mktemp("lines")
    files = (_write(directory, "jsonl"),)
    return windows(DataSection(source="text", files=files, cache_dir=str(directory / "cache"), validation_fraction=0.2))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_windows(tmp_path, form, expected):
    files = (_write(tmp_path, form),)
    assert texts(files[0]) == TEXTS
    section = DataSection(source="text", files=files, cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    found = windows(section)
    assert len(found) == len(expected) > 100
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("filters", "keeps"),
    [
        (["language == en"], lambda row: row["language"] == "en"),
        (["language != en"], lambda row: row["language"] != "en"),
        (["score >= 0.5", "language in [de, fr]"], lambda row: (row["score"] or 0) >= 0.5 and row["language"] == "de"),
        (["score == null"], lambda row: row["score"] is None),
    ],
)
def test_a_filter_reads_some_of_the_records(tmp_path, form, filters, keeps):
    kept = [row["text"] for row in ROWS if row["text"] and keeps(row)]
    assert texts(_write(tmp_path, form), *filters) == kept


def test_a_filter_may_ask_for_a_field_in_a_field(tmp_path):
    rows = [{"text": "a", "meta": {"pile": "wiki", "n": 1}}, {"text": "b", "meta": {"pile": "web"}}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert texts(tmp_path / name, "meta.pile == wiki") == ["a"]
        assert texts(tmp_path / name, "meta.n != 1") == ["b", "c"]
        assert texts(tmp_path / name, "meta.n > 0") == ["a"]


def test_a_filter_compares_as_json_does(tmp_path):
    rows = [{"text": "one", "v": 1}, {"text": "true", "v": True}, {"text": "string", "v": "1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(tmp_path / "a.jsonl", "v == 1") == ["one"]
    assert texts(tmp_path / "a.jsonl", "v == true") == ["true"]
    assert texts(tmp_path / "a.jsonl", 'v == "1"') == ["string"]
    wrong = refused(tmp_path / "a.jsonl", "v > 0")
    assert wrong.endswith("a.jsonl:3: data.filter=[v > 0]: compares a string with a number, '1'")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "v": [1]}\n')
    assert "a.jsonl:1: data.filter=[v == 1]: the field holds no string, number" in refused(
        tmp_path / "a.jsonl", "v == 1"
    )


@pytest.mark.parametrize(
    ("condition", "right"),
    [
        ("language", "FIELD OPERATOR VALUE"),
        ("language = en", "FIELD OPERATOR VALUE"),
        ("__import__('os').system('true')", "FIELD OPERATOR VALUE"),
        ("language in en", "need a list"),
        ("language == [en]", "need a list"),
        ("score < null", "needs a number or a string"),
        ("language == 'en'", "double quotes"),
        ("language in [[1]", "double quotes"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_configuration(condition, right):
    with pytest.raises(ConfigError, match=r"data\.filter=") as error:
        DataSection(source="text", files=("a.jsonl",), filter=(condition,))
    assert right in str(error.value)
    assert "\n" not in str(error.value)


def test_a_filter_is_for_records_alone(tmp_path):
    (tmp_path / "a.txt").write_text("A text.\n")
    assert "a.txt: a text file has no fields to filter by" in refused(tmp_path / "a.txt", "language == en")
    with pytest.raises(ConfigError, match=r"data\.filter.*only for data\.source=text"):
        DataSection(filter=("language == en",))


def test_a_filter_that_no_record_meets_is_named(tmp_path):
    section = DataSection(
        source="text", files=(_write(tmp_path, "jsonl"),), cache_dir=str(tmp_path / "cache"), filter=("language == fr",)
    )
    with pytest.raises(DataError, match=r"data\.filter=\[language == fr\]: no record of data\.files meets it"):
        windows(section)


def test_a_source_of_a_mixture_has_a_filter_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("A text without fields.\n" * 100)
    records = SourceSection(files=(_write(tmp_path, "jsonl"),), filter=("language == en",))
    mixture = {"plain": SourceSection(files=(str(tmp_path / "a.txt"),)), "records": records}
    section = DataSection(mixture=mixture, cache_dir=str(tmp_path / "cache"), validation_fraction=0)
    data = open_data(section, seq_len=16, vocab_size=257, progress=False)
    english = [row["text"].encode() for row in ROWS if row["text"] and row["language"] == "en"]
    assert data.sources["records"].train.num_tokens == sum(map(len, english)) + len(english)
    with pytest.raises(ConfigError, match=r"data\.mixture\.t\.filter.*only for a source of text"):
        DataSection(mixture={"t": SourceSection(files=("a.npy",), filter=("language == en",))})


def test_another_filter_tokenizes_again_and_none_finds_what_there_was(tmp_path):
    path = _write(tmp_path, "jsonl")
    plain, other = (text_corpus("data.files", [path], "text", parse_conditions(each)) for each in ((), ("score > 0",)))
    assert plain.signature() == other.signature()[:-1]
    assert [len(one) for one in plain.signature()] == [4]


def test_names_of_columns_are_named_where_one_is_missing(tmp_path):
    parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").endswith("a.parquet: no column 'text'; it has: content, id")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    assert "b.parquet: row 1: field 'text' (data.text_field) must hold a string, not a number" in refused(
        tmp_path / "b.parquet"
    )
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    assert "c.parquet: row 2: field 'text' (data.text_field) must hold a string, not null" in refused(
        tmp_path / "c.parquet"
    )
    assert texts(tmp_path / "c.parquet", "text != null") == ["a"]


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream.arrow", "tar", "gnu.tar", "joined.tzst"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.3])
def test_a_truncated_file_is_one_line(tmp_path, form, share):
    path = pathlib.Path(_write(tmp_path, form))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refused(path)
    assert message.startswith(str(path))
    assert "truncated" in message


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream.arrow", "tar"])
def test_damage_is_one_line_or_is_no_structure(tmp_path, form):
    path = pathlib.Path(_write(tmp_path, form))
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(30):
        damaged = bytearray(content)
        for place in draw.integers(8, len(content), 20):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        lines.append(outcome(path))
    assert any(lines)
    assert all("\n" not in line and (not line or str(path) in line) for line in lines)


def test_a_name_that_promises_another_format_is_named(tmp_path):
    for name, promised in (("a.parquet", "a Parquet file"), ("a.feather", "an Arrow file"), ("a.tar", "a tar archive")):
        (tmp_path / name).write_text("Just a text.\n")
        assert f"its name says {promised}, but it does not begin like one" in refused(tmp_path / name)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "b.parquet").read_bytes()))
    assert "packed once more; unpack it" in refused(tmp_path / "b.parquet.gz")


def test_a_column_of_a_large_row_group_is_read_in_pieces(tmp_path):
    """64 MiB of text in one row group: no more than a few batches, and the buffer, are in memory at once."""
    draw = np.random.default_rng(0)
    rows = [draw.bytes(4096).hex() for _ in range(8192)]
    parquet.write_table(pyarrow.table({"text": rows, "other": rows}), tmp_path / "a.parquet", row_group_size=len(rows))
    pool = pyarrow.default_memory_pool()
    before, most, count = pool.bytes_allocated(), 0, 0
    for document in tables.table_rows(tmp_path / "a.parquet", tables.PARQUET, ["text"]):
        count += len(document.fields["text"])
        most = max(most, pool.bytes_allocated() - before)
    assert count == 64 << 20
    assert most < 24 << 20


def test_a_tar_header_may_not_be_as_long_as_it_says(tmp_path):
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert "a header of 1099511627776 bytes" in refused(tmp_path / "a.tar")
    member = tarfile.TarInfo("a.txt")
    member.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert "the member a.txt has more than 64 MiB" in refused(tmp_path / "a.tar")


def test_only_the_members_of_a_tar_that_are_text_are_read_and_nothing_is_unpacked(tmp_path, monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in (
            ("../../evil.txt", tarfile.REGTYPE),
            ("/etc/link.txt", tarfile.SYMTYPE),
            ("d.txt", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"abc"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(stream.getvalue())
    monkeypatch.chdir(tmp_path / "in")
    assert texts(tmp_path / "in" / "a.tar") == ["abc"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_a_tar_without_texts_is_refused(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    assert "holds no text" in refused(tmp_path / "a.tar")


def test_a_directory_of_datasets_is_what_it_says(tmp_path):
    path = tmp_path / "ds"
    saved_dataset(path, pyarrow.Table.from_pylist(ROWS))
    (path / "cache-1.arrow").write_bytes(b"something else")
    corpus = text_corpus("data.files", [str(path)], "text")
    assert [file.path.name for file in corpus.files] == ["data-9.arrow", "data-8.arrow", "data-7.arrow"]
    assert [one.name for one in corpus.identities] == ["data-9.arrow", "data-8.arrow", "data-7.arrow"]
    (path / "data-8.arrow").unlink()
    assert "state.json names data-8.arrow, which is no file in that directory" in refused(path)
    (path / "state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    assert "names ../../secret.arrow, which is no file" in refused(path)
    (path / "state.json").write_text('{"_data_files": 3')
    assert "state.json: not JSON" in refused(path)
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert f"holds several splits; name those that are meant: {path}/train, {path}/test" in refused(path)


@pytest.mark.long
def test_what_the_library_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "ds"), num_shards=3)
    assert texts(tmp_path / "ds") == TEXTS
    datasets.Dataset.from_list(ROWS).select(range(5, 9)).save_to_disk(str(tmp_path / "some"))
    assert texts(tmp_path / "some") == TEXTS[5:9]
