"""Files on servers, in buckets and on the Hub: the same data as on a disk, found by their patterns."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fetched_files import MIB, random_bytes, refused, written
from remote_servers import hub_server, put, remove

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.files.identity import identities
from hybridnorm_jax.data.files.patterns import find_files, pattern_root
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.errors import MissingExtraError

# The same data as on a disk


def write_corpus(directory):
    """Three files of records and one of text, in two folders."""
    (directory / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "b c.jsonl", "sub/d.jsonl"):
        lines = [json.dumps({"text": f"{name} {number}. " * 40}) for number in range(200)]
        (directory / name).write_text("\n".join(lines))
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.jsonl"))


def read(section):
    data = open_data(section, seq_len=64, vocab_size=257, progress=False)
    rows = [row for part in (data.train, *data.validation.values()) for row in (part[0], part[len(part) - 1])]
    files = [file for source in data.sources.values() for file in source.files]
    return files, [array.tolist() for row in rows for array in row.values()]


@pytest.mark.parametrize("place", ["s3", "list", "remote list"])
def test_moving_text_to_a_bucket_or_a_server_changes_nothing(web, bucket, tmp_path, place):
    names = write_corpus(tmp_path / "data")
    for name in names:
        content = (tmp_path / "data" / name).read_bytes()
        put(bucket, f"bucket/moved/{name.replace(' ', '%20')}", content)
        web.put(f"x/{name.replace(' ', '%20')}", content)
    if place == "s3":
        patterns = ("s3://bucket/moved/*.jsonl", "s3://bucket/moved/sub/*.jsonl")
    elif place == "list":
        (tmp_path / "list.txt").write_text(
            "# of a server\n\n" + "\n".join(f"{web.url}/x/{name.replace(' ', '%20')}" for name in names)
        )
        patterns = (f"@{tmp_path}/list.txt",)
    else:
        web.put("x/list.txt", "\n".join(name.replace(" ", "%20") for name in names).encode())
        patterns = (f"@{web.url}/x/list.txt",)
    local = DataSection(source="text", files=(f"{tmp_path}/data/**/*.jsonl",), cache_dir=str(tmp_path / "cache"))
    here, there = read(local), read(dataclasses.replace(local, files=patterns))
    assert here == there
    assert [file.name for file in here[0]] == names


def test_a_remote_list_names_no_file_of_this_machine(web):
    for line in ("/etc/passwd", "~/secret.txt"):
        url = web.put("list.txt", f"a.txt\n{line}\n".encode())
        assert refused(find_files, "data.files", [f"@{url}"]) == (
            f"data.files: @{url}: names {line}, but a remote list may name no file of this machine"
        )


def test_moving_token_files_to_a_bucket_changes_nothing(bucket, tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 257, 700_000).astype(np.uint16))
        put(bucket, f"bucket/tokens/{number}.npy", (tmp_path / f"{number}.npy").read_bytes())
    local = DataSection(source="tokens", files=(f"{tmp_path}/*.npy",), cache_dir=str(tmp_path / "cache"))
    moved = dataclasses.replace(local, files=("s3://bucket/tokens/*.npy",))
    assert read(local) == read(moved)
    put(bucket, "bucket/tokens/1.npy", b"not tokens!")
    message = refused(read, moved)
    assert message.startswith("s3://bucket/tokens/1.npy: ")


@pytest.mark.parametrize("place", ["bucket", "bucket, one by one", "server"])
def test_documents_and_targets_come_with_remote_tokens(web, bucket, tmp_path, place):
    (tmp_path / "data").mkdir()
    for number in range(2):
        np.save(tmp_path / f"data/{number}.npy", np.arange(60, dtype="<u2"))
        np.save(tmp_path / f"data/{number}.ends.npy", np.arange(5 - number, 61, 5 - number, dtype="<u8"))
        np.save(tmp_path / f"data/{number}.targets.npy", (np.arange(60) % 3 == number).astype("u1"))
    for file in (tmp_path / "data").iterdir():
        put(bucket, f"bucket/ends/{file.name}", file.read_bytes())
        web.put(f"ends/{file.name}", file.read_bytes())
    local = DataSection(
        source="tokens",
        files=(f"{tmp_path}/data/*.npy",),
        cache_dir=str(tmp_path / "cache"),
        packing="padded",
        validation_fraction=0.0,
    )
    files = {
        "bucket": ("s3://bucket/ends/*.npy",),
        "bucket, one by one": ("s3://bucket/ends/0.npy", "s3://bucket/ends/?.npy"),
        "server": tuple(f"{web.url}/ends/{number}.npy?a=b" for number in range(2)),
    }[place]
    moved = dataclasses.replace(local, files=files)
    rows = [
        [
            (row["tokens"].tolist(), row["weights"].tolist())
            for row in open_data(each, seq_len=8, vocab_size=60, progress=False).train
        ]
        for each in (local, moved)
    ]
    assert len(rows[0]) == 12 + 15
    # The first token of a document is no target.
    first, second = (range(0, 60, 3), 5), (range(1, 60, 3), 4)
    expected = sum(token % length > 0 for learned, length in (first, second) for token in learned)
    assert sum(sum(weights) for _, weights in rows[0]) == expected
    assert rows[0] == rows[1]


def test_identities_are_those_of_a_disk_without_fetching(web, tmp_path):
    (tmp_path / "data").mkdir()
    for name, size in (("small", 1000), ("whole", MIB), ("long", MIB + 1), ("empty", 0)):
        (tmp_path / "data" / name).write_bytes(random_bytes(size))
        web.put(f"data/{name}", random_bytes(size))
    names = sorted(os.listdir(tmp_path / "data"))
    here = identities([tmp_path / "data" / name for name in names])
    web.sent = 0
    files = find_files("data.files", [f"{web.url}/data/{name}" for name in names])
    assert identities(files) == here
    assert web.sent < 1.3 * MIB  # of the long one samples alone
    assert pattern_root([f"{web.url}/data/{name}?a=b" for name in names]) == f"{web.url}/data"


def test_what_is_known_of_a_version_is_not_asked_for_again(web, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = find_files("data.files", [web.put("a.txt", b"one")])
    first = identities(files)
    asked = web.requests["GET", "/a.txt"]
    assert identities(find_files("data.files", [f"{web.url}/a.txt"])) == first
    assert web.requests["GET", "/a.txt"] == asked
    web.put("a.txt", b"two")
    assert identities(find_files("data.files", [f"{web.url}/a.txt"])) != first


# Buckets


def test_patterns_of_a_bucket(bucket):
    for name in ("p/b.txt", "p/a.txt", "p/deep/c.txt", "p/d.csv"):
        put(bucket, f"bucket/{name}", name.encode())
    found = [os.fspath(file) for file in find_files("data.files", ["s3://bucket/p/*.txt", "s3://bucket/p/a.txt"])]
    assert found == ["s3://bucket/p/a.txt", "s3://bucket/p/b.txt"]
    assert len(find_files("data.files", ["s3://bucket/p/**/*.txt"])) == 3
    assert refused(find_files, "data.files", ["s3://bucket/p"]) == (
        "data.files: s3://bucket/p is a directory without manifest.json, which a whole one of `hybridnorm tokenize` "
        "has; name its files, such as s3://bucket/p/*.parquet"
    )
    for absent in ("s3://bucket/p/none.txt", "s3://bucket/p/*.zip", "s3://no-such-bucket/a.txt"):
        assert refused(find_files, "data.files", [absent]) == f"data.files: no such file: {absent}"


def test_an_object_that_changes_or_vanishes_is_one_line(bucket, copies):
    put(bucket, "bucket/c/a.txt", b"one")
    files = find_files("data.files", ["s3://bucket/c/a.txt"])
    put(bucket, "bucket/c/a.txt", b"two")
    assert "s3://bucket/c/a.txt: was changed or removed while it was read" in refused(copies.fetched, files)
    remove(bucket, "bucket/c/a.txt")
    assert "s3://bucket/c/a.txt: no such file" in refused(copies.fetched, files)


def test_a_missing_credential_is_one_line_with_what_to_do(bucket, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": bucket, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    program = (
        "from hybridnorm_jax.data.files.patterns import find_files\nfind_files('data.files', ['s3://bucket/a.txt'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "s3://bucket/a.txt: no credentials (" in last
    assert "set AWS_ACCESS_KEY_ID" in last


def test_a_bucket_that_is_down_is_one_line(bucket, monkeypatch):
    program = (
        "from hybridnorm_jax.data.places import patience\n"
        "patience.FIRST_WAIT = 0.01\n"
        "from hybridnorm_jax.data.files.patterns import find_files\n"
        "find_files('data.files', ['s3://bucket/a.txt'])"
    )
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "s3://bucket/a.txt: cannot be read after 5 tries (" in result.stderr.strip().splitlines()[-1]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        MissingExtraError, match=r"gs:// files: needs the extra `remote`: pip install 'hybridnorm-jax\[remote\]'"
    ):
        store_of("gs://bucket/a.txt").find("gs://bucket/a.txt")


# Hugging Face's Hub


def test_a_dataset_of_the_hub_is_read_by_name(tmp_path):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parts = [pyarrow.table({"text": [f"text {part} {row}" for row in range(3)]}) for part in range(2)]
    for number, part in enumerate(parts):
        parquet.write_table(part, tmp_path / f"{number}.parquet")
    contents = [(tmp_path / f"{number}.parquet").read_bytes() for number in range(2)]
    files = {f"data/train-{number}.parquet": content for number, content in enumerate(contents)} | {"README.md": b"Hi"}
    tokens = written(tmp_path / "tokens")
    files |= {f"tokens/{path.name}": path.read_bytes() for path in tokens.iterdir()}
    program = """
import json, sys
from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.places import patience
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.data.tokens.tokenized_source import directories_of

copies = LocalCopies(sys.argv[1], 1 << 30)

def outcome(pattern):
    try:
        corpus = text_corpus("data.files", [pattern], "text", copies=copies)
        return [document.text for file in corpus.files for document in corpus.documents(file)]
    except DataError as error:
        return str(error)

patience.FIRST_WAIT = 0.01
(tokens,) = directories_of("data.files", [sys.argv[2]], copies)
found = tokens.stream(["train"], 257).read(0, 100).tolist()
print(json.dumps([found] + [outcome(pattern) for pattern in sys.argv[3:]]))
"""
    name = "hf://datasets/owner/name"
    patterns = [
        f"{name}/tokens",
        f"{name}/data/*.parquet",
        f"{name}/README.md",
        name,
        f"{name}/none.txt",
        "hf://datasets/owner/none/a.txt",
    ]
    with hub_server(files) as url:
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",  # tests of models set it in this process
            "HF_HOME": str(tmp_path / "hf"),
        }
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "cache"), *patterns],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr
    ids, rows, readme, *refusals = json.loads(result.stdout)
    assert rows == [f"text {part} {row}" for part in range(2) for row in range(3)]
    assert readme == ["Hi"]
    assert ids == np.load(tokens / "train-00000.npy")[:100].tolist()
    assert refusals == [
        f"data.files: {name} is a directory without manifest.json, which a whole one of `hybridnorm tokenize` has; "
        f"name its files, such as {name}/*.parquet",
        f"data.files: no such file: {name}/none.txt",
        "hf://datasets/owner/none/a.txt: no such file; it was removed, or its name is another",
    ]


# Very many files


FEW_DESCRIPTORS = """
import resource, sys
import numpy as np
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import open_data

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
source, end = sys.argv[2:4]
section = DataSection(
    source=source, files=(f"{sys.argv[1]}/*.{end}",), cache_dir=f"{sys.argv[1]}/cache", validation_fraction=0
)
data = open_data(section, seq_len=15, vocab_size=257, progress=False)
order = np.random.default_rng(0).permutation(len(data.train))
print(len(data.sources[""].files), sum(int(data.train[int(index)]["targets"].sum()) for index in order))
"""


@pytest.mark.long
@pytest.mark.parametrize(("source", "end"), [("text", "txt"), ("tokens", "npy")])
def test_ten_thousand_files_need_a_hundred_descriptors(tmp_path, source, end):
    """Every window of 10,000 files is read, in an order that goes from file to file."""
    count = 10_000
    for number in range(count):
        if source == "text":
            (tmp_path / f"{number:05}.txt").write_bytes(b"%015d" % number)
        else:
            np.save(tmp_path / f"{number:05}.npy", np.full(16, number % 257, np.uint16))
    arguments = [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path), source, end]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home")}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    files, total = map(int, result.stdout.split())
    assert files == count
    if source == "text":
        ids = np.concatenate([[*(b"%015d" % number), 256] for number in range(count)])
    else:
        ids = np.repeat(np.arange(count) % 257, 16)
    assert total == ids[1 : 1 + (len(ids) - 1) // 15 * 15].sum()
