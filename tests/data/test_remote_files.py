"""Files on servers and in buckets: fetched whole or not at all, the same data as on a disk, one line for a fault."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from remote_servers import hub_server, put, remove, s3_environment, s3_server, web_server

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.identity import identities
from hybridnorm_jax.data.places import local_copies, patience
from hybridnorm_jax.data.places.http_store import _Redirects
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.patterns import find_files, pattern_root
from hybridnorm_jax.data.places.remote_file import RemoteFile, readable
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.data.sources import text_corpus
from hybridnorm_jax.errors import MissingExtraError

MIB = 1 << 20


@pytest.fixture
def web(monkeypatch):
    """A web server, and waits that a test can afford."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    with web_server() as files:
        yield files


@pytest.fixture(scope="module")
def bucket():
    """The address of a server of S3, and its credentials in the environment."""
    pytest.importorskip("s3fs")
    before = dict(os.environ)
    with s3_server() as url:
        os.environ.update(s3_environment(url))
        yield url
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def copies(tmp_path):
    return LocalCopies(str(tmp_path / "cache"), 64 * MIB)


def content_of(place) -> bytes:
    with open(readable(place), "rb") as stream:
        return stream.read()


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(copies) -> list[str]:
    """The folders of copies, whole or not."""
    return [name for name in os.listdir(copies._folder()) if name not in ("locks", "owners")]


# Faults of a server


@pytest.mark.parametrize("faults", [[], [500, 503], ["cut", "cut"], [429, "cut", 500, "cut"], ["cut"] * 4])
@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_server_that_fails_a_few_times_gives_the_whole_file(web, copies, monkeypatch, capsys, faults, has_ranges):
    monkeypatch.setattr("hybridnorm_jax.data.places.http_store.PIECE_BYTES", MIB)
    content = random_bytes(3 * MIB + 17)
    url = web.put("a.bin", content)
    web.has_ranges = has_ranges
    files = find_files("data.files", [url])
    web.faults["/a.bin"] = list(faults)
    (copy,) = copies.fetched(files)
    assert content_of(copy) == content
    assert not web.faults["/a.bin"]
    assert capsys.readouterr().err.count("trying again") == len(faults)


def test_what_came_is_not_asked_for_again(web, copies, monkeypatch):
    monkeypatch.setattr("hybridnorm_jax.data.places.http_store.PIECE_BYTES", MIB)
    url = web.put("a.bin", random_bytes(16 * MIB))
    files = find_files("data.files", [url])
    web.faults["/a.bin"] = ["cut"]  # eight of the sixteen come
    copies.fetched(files)
    assert web.sent == (16 + 8) * MIB


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        ([500] * 9, "HTTP 500"),
        (["cut"] * 9, "the connection ended after"),
        (["hang"] * 9, "no answer in 0.3 s"),
        (["trickle"] * 9, "no answer in 0.3 s"),
    ],
)
def test_a_server_that_goes_on_failing_is_one_line(web, copies, monkeypatch, faults, cause):
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(patience, "TRIES", 3)
    url = web.put("a.bin", random_bytes(1000))
    files = find_files("data.files", [url])
    web.faults["/a.bin"] = faults
    began = time.monotonic()
    message = refused(copies.fetched, files)
    assert message.startswith(f"{url}: cannot be read after 3 tries ({cause}")
    assert time.monotonic() - began < 5
    assert cached(copies) == []


def test_waits_grow_and_are_not_alike(monkeypatch):
    waits = []
    monkeypatch.setattr(patience, "sleep", waits.append)

    def fail():
        raise ConnectionError("reset")

    for _ in range(20):
        refused(patience.patiently, "https://a/b", fail)
    by_try = np.array(waits).reshape(20, patience.TRIES - 1)
    for number, longest in enumerate((1, 2, 4, 8)):
        assert (by_try[:, number] >= longest / 2).all()
        assert (by_try[:, number] <= longest).all()
    assert len(set(waits)) > 70


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (410, "no such file"), (403, "access is refused"), (400, "refused")]
)
def test_what_trying_again_cannot_mend_ends_at_once(web, copies, status, words):
    url = web.put("a.bin", b"abc")
    files = find_files("data.files", [url])
    web.faults["/a.bin"] = [status] * 2
    assert words in refused(copies.fetched, files)
    assert web.requests["GET", "/a.bin"] == 1


def test_no_server_is_one_line(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    message = refused(find_files, "data.files", ["http://127.0.0.1:9/a.txt"])
    assert message.startswith("http://127.0.0.1:9/a.txt: cannot be read after 5 tries (")
    assert "refused" in message


def test_a_file_that_changes_or_vanishes_in_the_middle_of_a_run_is_one_line(web, copies):
    url = web.put("a.jsonl", b'{"text": "one"}\n')
    corpus = text_corpus("data.files", [url], "text", copies=copies)
    web.put("a.jsonl", b'{"text": "two"}\n')
    message = refused(lambda: list(corpus.documents(corpus.files[0])))
    assert message == f"{url}: was changed while it was read; start again with files that nobody writes to"
    del web.content["/a.jsonl"]
    assert "no such file; it was removed" in refused(lambda: list(corpus.documents(corpus.files[0])))
    assert cached(copies) == []


def test_a_file_that_changes_between_two_pieces_is_seen(web, copies, monkeypatch):
    monkeypatch.setattr("hybridnorm_jax.data.places.http_store.PIECE_BYTES", MIB)
    url = web.put("a.bin", random_bytes(4 * MIB))
    (file,) = find_files("data.files", [url])
    pieces = store_of(url).pieces(file, 0)
    next(pieces)
    web.faults["/a.bin"] = []
    web.put("a.bin", random_bytes(4 * MIB, seed=1))
    web.faults["/a.bin"] = ["cut"]
    # The first answer may have been sent already; any later one is of another version.
    with pytest.raises(DataError, match="was changed while it was read"):
        b"".join(store_of(url).pieces(file, MIB))
    pieces.close()


def test_content_is_checked_against_the_digest_that_a_server_states(web, copies):
    web.digest = "right"
    content = random_bytes(2 * MIB)
    url = web.put("a.bin", content)
    assert content_of(copies.fetched(find_files("data.files", [url]))[0]) == content
    web.digest = "wrong"
    url = web.put("b.bin", content)
    assert "another sha256 than its store says" in refused(copies.fetched, find_files("data.files", [url]))


def test_addresses_that_cannot_be_right_are_refused(web):
    for url, words in (
        ("https://user:secret@example.org/a.txt", "a user or password"),
        ("https://example.org/*.txt", "@list.txt"),
        ("https://example.org/", "a directory"),
        ("https:///a.txt", "no address"),
        ("https://example.org/ä b.txt", "%20"),
        ("ftp://example.org/a.txt", "files of ftp:// cannot be read"),
    ):
        message = refused(find_files, "data.files", [url])
        assert words in message
        assert "secret" not in message


def test_a_signature_in_an_address_is_not_shown(web):
    url = web.put("a.txt", b"text") + "?X-Signature=secret"
    (file,) = find_files("data.files", [url])
    assert file.name == "a.txt"
    assert "secret" not in str(file)
    del web.content["/a.txt"]
    assert "secret" not in refused(find_files, "data.files", [url])


def test_redirects_are_followed_but_not_to_other_protocols(web, copies):
    url = web.put("real.txt", b"text")
    web.faults["/a.txt"] = [url] * 2
    (copy,) = copies.fetched(find_files("data.files", [f"{web.url}/a.txt"]))
    assert content_of(copy) == b"text"
    web.faults["/b.txt"] = ["file:///etc/passwd"]
    assert "leads" in refused(find_files, "data.files", [f"{web.url}/b.txt"])
    web.faults["/c.txt"] = [f"{web.url}/c.txt"] * 99
    assert "leads" in refused(find_files, "data.files", [f"{web.url}/c.txt"])
    asked = urllib.request.Request("https://example.org/a.txt")
    message = refused(_Redirects().redirect_request, asked, None, 302, "Found", {}, "http://example.org/a.txt")
    assert message == "https://example.org/a.txt: its server leads from https:// to http://; refused"


def test_servers_that_can_do_little_serve_too(web, tmp_path):
    web.has_head = web.has_versions = False
    url = web.put("a.txt", b"text")
    first = LocalCopies(str(tmp_path / "cache"), MIB)
    (copy,) = first.fetched(find_files("data.files", [url]))
    assert content_of(copy) == b"text"
    # Without a version nobody knows whether the copy is still right.
    web.put("a.txt", b"more")
    (other,) = LocalCopies(str(tmp_path / "cache"), MIB).fetched(find_files("data.files", [url]))
    assert content_of(other) == b"more"


# The cache


def test_a_copy_is_used_again_and_another_version_is_another_copy(web, tmp_path):
    url = web.put("a.txt", b"one")
    for _ in range(2):
        (copy,) = LocalCopies(str(tmp_path / "cache"), MIB).fetched(find_files("data.files", [url]))
    assert web.requests["GET", "/a.txt"] == 1
    web.put("a.txt", b"two")
    (other,) = LocalCopies(str(tmp_path / "cache"), MIB).fetched(find_files("data.files", [url]))
    assert (content_of(copy), content_of(other)) == (b"one", b"two")


def test_a_copy_that_somebody_has_damaged_is_fetched_again(web, tmp_path):
    url = web.put("a.txt", b"one")
    copies = LocalCopies(str(tmp_path / "cache"), MIB)
    with copies.held(find_files("data.files", [url])[0]) as copy:
        os.truncate(readable(copy), 1)
    with copies.held(find_files("data.files", [url])[0]) as copy:
        assert content_of(copy) == b"one"


def test_the_copies_used_longest_ago_go_first_and_never_one_in_use(web, tmp_path):
    copies = LocalCopies(str(tmp_path / "cache"), 4000)
    files = [find_files("data.files", [web.put(f"{number}.bin", random_bytes(1000, number))])[0] for number in range(8)]
    places = []
    for file in files[:4]:
        with copies.held(file) as copy:
            places.append(copy.copy)
    with copies.held(files[0]):
        pass  # used again
    with copies.held(files[1]) as kept:
        for file in files[4:]:
            with copies.held(file):
                assert len(cached(copies)) <= 4
        assert content_of(kept) == random_bytes(1000, 1)
        assert [path.exists() for path in places] == [False, True, False, False]
    other = LocalCopies(str(tmp_path / "cache"), 4000)
    other.fetched(files[:4])
    message = refused(copies.fetched, files[4:5])
    assert "data.cache_gib=" in message
    assert "4,000 bytes are in use" in message


@pytest.mark.parametrize("limit", [1, 2, 64])
def test_the_next_files_are_fetched_while_one_is_read(web, tmp_path, limit):
    """Also where the cache has room for one file alone; then they are fetched when it is their turn."""
    urls = [web.put(f"{number}.txt", b"%d " % number * 512 * 1024) for number in range(5)]
    corpus = text_corpus("data.files", urls, "text", copies=LocalCopies(str(tmp_path / "cache"), limit * MIB))
    texts = []
    for file in corpus.files:
        for document in corpus.documents(file):
            texts.append(document.text[0])
            if limit == 64:
                expected = min(len(texts) + 2, 5)
                until(lambda count=expected: len(web.requests) >= count + 5)  # each was asked for its size before
            assert len(cached(corpus.copies)) <= limit
    assert texts == list("01234")
    assert all(web.requests["GET", f"/{number}.txt"] == 1 for number in range(5))


def test_what_was_sent_for_gives_way_to_what_is_needed_now(web, tmp_path):
    copies = LocalCopies(str(tmp_path / "cache"), 1000)
    first, second = find_files("data.files", [web.put(f"{number}.bin", random_bytes(1000)) for number in range(2)])
    copies._send_for(second)
    until(lambda: copies._coming[second.url].done())
    with copies.held(first) as copy:
        assert content_of(copy) == random_bytes(1000)
        assert len(cached(copies)) == 1


def test_more_than_the_limit_is_refused_before_anything_is_fetched(web, tmp_path):
    copies = LocalCopies(str(tmp_path / "cache"), 1500)
    files = find_files("data.files", [web.put(f"{number}.bin", random_bytes(1000)) for number in range(2)])
    assert "set data.cache_gib to at least" in refused(copies.fetched, files)
    assert web.requests["GET", "/0.bin"] == 0


def test_a_full_disk_is_one_line(web, tmp_path, monkeypatch):
    copies = LocalCopies(str(tmp_path / "cache"), MIB)
    (file,) = find_files("data.files", [web.put("a.bin", random_bytes(1000))])
    usage = local_copies.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(local_copies.shutil, "disk_usage", lambda path: usage._replace(free=999))
        assert "no space left" in refused(copies.fetched, [file])
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
"""
    # Set after the imports: a limit must not cut the files in which Python keeps what it has compiled.
    program = FETCH.replace('print("ready", flush=True)', limit)
    result = run(program, file, tmp_path / "cache")
    assert result.returncode == 1
    assert f"DataError: data.cache_dir={tmp_path}/cache/remote: cannot be used (File too large)" in result.stderr
    assert cached(copies) == []


FETCH = """
import json, sys
from hybridnorm_jax.data.places.http_store import _Redirects
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.remote_file import RemoteFile
file = RemoteFile(**json.loads(sys.argv[1]))
print("ready", flush=True)
(copy,) = LocalCopies(sys.argv[2], 64 << 20).fetched([file])
print(copy.copy, flush=True)
"""


def start(program, file, cache) -> subprocess.Popen:
    arguments = [json.dumps(dataclasses.asdict(file)), str(cache)]
    return subprocess.Popen(
        [sys.executable, "-B", "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(happened) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(program, file, cache) -> subprocess.CompletedProcess:
    process = start(program, file, cache)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_processes_at_once_fetch_a_file_once(web, tmp_path):
    content = random_bytes(20 * MIB)
    (file,) = find_files("data.files", [web.put("a.bin", content)])
    processes = [start(FETCH, file, tmp_path / "cache") for _ in range(2)]
    found = {process.communicate(timeout=60)[0].split()[1] for process in processes}
    assert len(found) == 1
    with open(found.pop(), "rb") as stream:
        assert stream.read() == content
    assert web.sent == len(content)


def test_what_a_killed_process_left_is_never_taken_for_a_copy(web, tmp_path):
    content = random_bytes(4 * MIB)
    (file,) = find_files("data.files", [web.put("a.bin", content)])
    web.faults["/a.bin"] = ["trickle"]
    process = start(FETCH, file, tmp_path / "cache")
    copies = LocalCopies(str(tmp_path / "cache"), 5 * MIB)
    until(lambda: web.requests["GET", "/a.bin"])
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (copy,) = copies.fetched([file])  # there is room: the reservation has ended with its process
    assert content_of(copy) == content
    assert cached(copies) == [copy.copy.parent.name]


def test_a_killed_process_uses_nothing(web, tmp_path):
    files = [find_files("data.files", [web.put(f"{number}.bin", random_bytes(1000, number))])[0] for number in range(2)]
    process = start(f"{FETCH}\nimport time; time.sleep(60)", files[0], tmp_path / "cache")
    assert process.stdout.readline() == "ready\n"
    assert "/remote/" in process.stdout.readline()
    copies = LocalCopies(str(tmp_path / "cache"), 1500)
    assert "1,000 bytes are in use" in refused(copies.fetched, files[1:])
    process.kill()
    process.communicate(timeout=60)
    assert len(copies.fetched(files[1:])) == 1


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
        "data.files: s3://bucket/p is a directory; name its files, such as s3://bucket/p/*.parquet"
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
        "from hybridnorm_jax.data.places.patterns import find_files\nfind_files('data.files', ['s3://bucket/a.txt'])"
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
        "from hybridnorm_jax.data.places.patterns import find_files\n"
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


def test_a_file_that_was_not_fetched_has_no_content():
    with pytest.raises(ValueError, match="was not fetched"):
        readable(RemoteFile("s3://bucket/a", 1, "v"))


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
    program = """
import json, sys
from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.places import patience
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.sources import text_corpus

def outcome(pattern):
    try:
        corpus = text_corpus("data.files", [pattern], "text", copies=LocalCopies(sys.argv[1], 1 << 30))
        return [document.text for file in corpus.files for document in corpus.documents(file)]
    except DataError as error:
        return str(error)

patience.FIRST_WAIT = 0.01
print(json.dumps([outcome(pattern) for pattern in sys.argv[2:]]))
"""
    name = "hf://datasets/owner/name"
    patterns = [
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
    rows, readme, *refusals = json.loads(result.stdout)
    assert rows == [f"text {part} {row}" for part in range(2) for row in range(3)]
    assert readme == ["Hi"]
    assert refusals == [
        f"data.files: {name} is a directory; name its files, such as {name}/*.parquet",
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
