"""The cache of fetched files: used again, never above its limit, and shared by processes that may be killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fetched_files import MIB, cached, content_of, random_bytes, refused

from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.places import local_copies
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.remote_file import RemoteFile, readable
from hybridnorm_jax.data.text.sources import text_corpus


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


def test_a_file_that_was_not_fetched_has_no_content():
    with pytest.raises(ValueError, match="was not fetched"):
        readable(RemoteFile("s3://bucket/a", 1, "v"))
