"""Directories of `hybridnorm tokenize` in a bucket and on a web server: read as on a disk, refused as on a disk."""

import dataclasses
import json
import os

import numpy as np
import pytest
from fetched_files import MIB, refused, written
from remote_servers import put, remove

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.files.patterns import find_files, pattern_root
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.tokens.tokenized_directory import open_tokenized

PLACES = ("bucket", "bucket/", "server", "server/", "poor server")
WHERE = {"bucket": "s3://bucket/{}", "bucket/": "s3://bucket/{}/"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tokenized") / "tokens")


@pytest.fixture
def moved(web, bucket, tmp_path):
    """Copies a directory to every place; returns its name in one of them."""

    def move(directory, place, name=None):
        name = name or f"{tmp_path.name}-{directory.name}"
        for path in directory.iterdir():
            put(bucket, f"bucket/{name}/{path.name}", path.read_bytes())
            web.put(f"{name}/{path.name}", path.read_bytes())
        if place == "poor server":  # as a bucket's public address, whose files nobody may list
            web.absent, web.has_head = 403, False
        return WHERE.get(place, web.url + ("/{}/" if place == "server/" else "/{}?key=a.b")).format(name)

    return move


@pytest.fixture
def section(tmp_path):
    def make(name, **settings):
        base = {"source": "tokens", "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return DataSection(files=(str(name),), **(base | settings))

    return make


def opened(section, *, vocab_size=257):
    return open_data(section, seq_len=32, vocab_size=vocab_size, progress=False)


def everything(data):
    """All that a run takes from its data, but the name of the place."""
    parts = [data.train, *data.validation.values()]
    return {
        "rows": [{name: values.tolist() for name, values in part[index].items()} for part in parts for index in
                 range(len(part))],
        "counts": [(part.num_tokens, part.bytes_per_token, part.words_per_token) for part in parts],
        "files": data.first.files,
        "documents": data.first.documents,
        "is_split_by_hash": data.first.is_split_by_hash,
        "tokenizer": data.tokenizer and data.tokenizer.name,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "packing"), [*((place, "documents") for place in PLACES), ("bucket", "windows"), ("server", "windows")]
)
def test_moving_a_directory_changes_nothing(tokens, moved, section, place, packing):
    there = moved(tokens, place)
    settings = {"packing": packing, "segment_ids": packing == "windows"}
    settings["validation"] = {"train_all": (str(tokens),)}
    here = opened(section(tokens, **settings))
    settings["validation"] = {"train_all": (there,)}
    data = opened(section(there, **settings))
    assert everything(data) == everything(here)
    assert (
        data.description.replace(there.partition("?")[0].rstrip("/"), str(tokens)).replace("tokens/", "tokens")
        == here.description
    )
    assert "key=" not in data.description  # it may be a signature


@pytest.mark.parametrize("place", ["bucket", "server"])
def test_what_is_learned_comes_with_a_directory(moved, section, tmp_path, place):
    here = written(tmp_path / "chat", records="prompt")
    both = [everything(opened(section(name))) for name in (here, moved(here, place))]
    assert both[0] == both[1]
    weights = [weight for row in both[1]["rows"] for weight in row["weights"]]
    assert 0.2 < np.mean(weights) < 0.9


def test_a_copy_is_fetched_once_and_nothing_without_need(tokens, moved, section, web):
    there = moved(tokens, "server")
    find_files("data.files", [there])
    name = there.partition("?")[0].removeprefix(web.url)
    shard = ("GET", f"{name}/train-00000.npy")
    assert not web.requests[shard]
    opened(section(there))
    opened(section(there))
    assert web.requests[shard] == 1


def test_the_cache_is_bounded(tokens, moved, section):
    there = moved(tokens, "bucket")
    limit = 1000 / (1 << 30)
    message = refused(opened, section(there, cache_gib=limit))
    files = len(open_tokenized(tokens).manifest.files)
    assert f"{files} files that a run reads in any order take" in message
    assert "set data.cache_gib to at least" in message


@pytest.mark.parametrize("place", ["bucket", "server"])
def test_what_does_not_belong_is_refused(tokens, moved, section, place):
    there = moved(tokens, place)
    shown = there.partition("?")[0]
    assert f"{shown} was made with 0.2" in refused(opened, section(there, validation_fraction=0.1))
    assert f"256 ends the documents of {shown}" in refused(opened, section(there, separator_id=3))
    assert f"{shown}: its largest id 256 does not fit model.vocab_size=256" in refused(
        opened, section(there), vocab_size=256
    )
    both = dataclasses.replace(section(there), files=(there, f"{shown}/train-00000.npy"))
    assert f"{shown} is a directory of tokenized text" in refused(opened, both)


def test_another_tokenizer_is_refused(tokens, moved, section, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    there = moved(tokens, "bucket")
    message = refused(opened, section(there, tokenizer=str(tmp_path / "tokenizer.json")))
    assert f"the tokens of {there} were made by another one, bytes" in message


def changed(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("place", ["bucket", "server"])
@pytest.mark.parametrize("name", ["train-00001.npy", "validation-00000.ends.npy"])
@pytest.mark.parametrize("damage", [changed, lambda content: content[:-2], None])
def test_a_file_that_is_not_what_it_was_is_named(tokens, moved, section, web, bucket, place, name, damage):
    there = moved(tokens, place).partition("?")[0]
    folder = there.rpartition("/")[2]
    if damage is None:
        del web.content[f"/{folder}/{name}"]
        remove(bucket, f"bucket/{folder}/{name}")
        wrong = f"is missing, but {there}/manifest.json names it; copy the whole directory again"
    else:
        content = damage((tokens / name).read_bytes())
        web.put(f"{folder}/{name}", content)
        put(bucket, f"bucket/{folder}/{name}", content)
        wrong = f"is not the file that {there}/manifest.json names: it has changed, or was not copied whole"
    assert refused(opened, section(there)).startswith(f"{there}/{name}: {wrong}")


@pytest.mark.parametrize("place", ["bucket", "server", "server/"])
def test_a_directory_that_is_not_whole_is_refused(tokens, moved, section, web, bucket, place):
    there = moved(tokens, place).partition("?")[0]
    folder = there.rstrip("/").rpartition("/")[2]
    del web.content[f"/{folder}/manifest.json"]
    remove(bucket, f"bucket/{folder}/manifest.json")
    message = refused(opened, section(there))
    if place == "bucket":
        assert message.startswith(f"data.files: {there} is a directory without manifest.json")
    elif place == "server":
        assert message == f"data.files: no such file: {there}, nor is there {there}/manifest.json"
    else:
        right = "which a whole one of `hybridnorm tokenize` has; name its files"
        assert message == f"data.files: {there} is a directory without manifest.json, {right}"
    web.put(f"{folder}/unfinished.sqlite", b"")
    put(bucket, f"bucket/{folder}/unfinished.sqlite", b"")
    assert f"{there}: is not whole: it was stopped while it was written" in refused(opened, section(there))


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000, b"not JSON", b'{"format": 9}'])
def test_a_manifest_that_is_none_is_named(section, web, content):
    web.put("other/manifest.json", content)
    message = refused(opened, section(f"{web.url}/other"))
    assert message.startswith(f"{web.url}/other/manifest.json: cannot be read (")


@pytest.mark.parametrize("place", [None, "bucket", "server"])
def test_a_manifest_that_is_named_itself_is_refused(tokens, moved, place):
    there = str(tokens) if place is None else moved(tokens, place).partition("?")[0]
    right = f"is the manifest of a directory of tokens; name the directory, {there}"
    assert refused(find_files, "data.files", [f"{there}/manifest.json"]) == f"{there}/manifest.json: {right}"


def test_another_file_of_that_name_is_a_file(web, tmp_path):
    (tmp_path / "manifest.json").write_text('[{"text": "a record"}]')
    url = web.put("x/manifest.json", b'{"text": "a record"}')
    names = [str(tmp_path / "manifest.json"), url]
    assert [os.fspath(file) for file in find_files("data.files", names)] == names


def test_a_directory_that_is_named_twice_is_read_once(tokens, moved, section, monkeypatch):
    there = moved(tokens, "server").partition("?")[0]
    monkeypatch.chdir(tokens)
    for names in ((there, f"{there}/"), (str(tokens), ".")):
        data = opened(dataclasses.replace(section(tokens), files=names))
        assert everything(data)["counts"] == everything(opened(section(tokens)))["counts"]


@pytest.mark.parametrize("name", ["../tokens/train-00000.npy", "/etc/hostname", ""])
def test_a_manifest_names_files_of_its_directory_only(tokens, moved, section, web, name):
    there = moved(tokens, "server").partition("?")[0]
    path = there.removeprefix(f"{web.url}/") + "/manifest.json"
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["shards"]["train"][0]["file"]["name"] = name
    web.put(path, json.dumps(manifest).encode())
    assert f"it names {name!r}, which is no file of its directory" in refused(opened, section(there))


def test_the_page_of_a_directory_is_no_file(web):
    """Many servers lead from the name of a directory to a page that lists it."""
    web.put("listed/", b"<html>train-00000.npy</html>")
    web.faults["/listed"] = [f"{web.url}/listed/"] * 4
    message = refused(find_files, "data.files", [f"{web.url}/listed"])
    assert message == f"data.files: no such file: {web.url}/listed, nor is there {web.url}/listed/manifest.json"


def test_a_file_without_an_ending_is_still_a_file(web, bucket, tmp_path):
    web.put("plain/README", b"some text")
    put(bucket, "bucket/plain/README", b"some text")
    web.absent = 403
    for name in (f"{web.url}/plain/README", "s3://bucket/plain/README"):
        (file,) = find_files("data.files", [name])
        assert os.fspath(file) == name
        assert pattern_root([name]) == name.removesuffix("/README")
        (copy,) = LocalCopies(str(tmp_path / "cache"), MIB).fetched([file])
        assert copy.copy.read_bytes() == b"some text"


def test_files_whose_names_say_what_they_are_cost_no_further_request(web):
    for name in ("a.npy", "b.txt.zst", "c.parquet"):
        url = web.put(name, b"content")
        find_files("data.files", [f"{url}?key=1"])
        assert {path for _, path in web.requests} == {f"/{name}"}
        web.requests.clear()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("s3://bucket/tokens", "tokens"),
        ("gs://bucket/a.b/tokens/", "tokens"),
        ("s3://bucket/tokens-1.5/", "tokens"),
        ("https://server/tokens?key=a.b", "tokens"),
        ("https://server/a.jsonl?key=1", "text"),
        ("https://server/a.npy?key=1", "tokens"),
        ("s3://bucket/tokens/*", None),
        ("s3://bucket/tokens-1.5", None),
        ("tokens", None),
    ],
)
def test_what_the_name_of_a_remote_place_says(name, source):
    assert source_of(name) == source
    if source is not None and "=" not in name:
        assert parse(["quickstart", f"data.files=[{name}]"]).data.source == source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("S3://bucket/a.npy", "S3://bucket/a.npy: write S3:// in lower case: s3://bucket/a.npy"),
        ("s3://", "s3://: names no file; it must be as s3://BUCKET/PATH"),
        ("gs:///tokens", "gs:///tokens: names no file; it must be as gs://BUCKET/PATH"),
        ("hf://", "hf://: names no file; it must be as hf://datasets/OWNER/NAME/PATH"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_at_once(name, message):
    assert refused(find_files, "data.files", [name]) == message
