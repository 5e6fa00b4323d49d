"""Files on servers that fail, change or mislead: fetched whole or not at all, and one line for a fault."""

import shlex
import time
import urllib.request

import numpy as np
import pytest
from fetched_files import MIB, cached, content_of, random_bytes, refused
from written_tokens import megatron

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.places import patience
from hybridnorm_jax.data.places.http_store import _Redirects
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.data.text.sources import text_corpus


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


@pytest.mark.parametrize("has_head", [True, False])
def test_a_file_that_is_overwritten_while_it_is_sent_is_no_copy(web, copies, has_head):
    """One answer of the right length, whose second half is of the next version of the file."""
    web.has_head = has_head
    url = web.put("a.bin", random_bytes(3 * MIB))
    files = find_files("data.files", [url])
    web.faults["/a.bin"] = ["overwrite"]
    message = refused(copies.fetched, files)
    assert message == f"{url}: was changed or removed while it was read; start again with files that nobody writes to"
    assert cached(copies) == []
    (copy,) = copies.fetched(find_files("data.files", [url]))
    assert content_of(copy) == bytes(3 * MIB)


def test_content_is_checked_against_the_digest_that_a_server_states(web, copies):
    web.digest = "right"
    content = random_bytes(2 * MIB)
    url = web.put("a.bin", content)
    assert content_of(copies.fetched(find_files("data.files", [url]))[0]) == content
    web.digest = "wrong"
    url = web.put("b.bin", content)
    assert "another sha256 than its store says" in refused(copies.fetched, find_files("data.files", [url]))


def test_addresses_that_cannot_be_right_are_refused(web):
    words_of_list = """'data.files=["@list.txt"]'"""
    for url, words in (
        ("https://user:secret@example.org/a.txt", "a user or password"),
        ("https://example.org/*.txt", words_of_list),
        (f"{web.url}/", "a directory"),
        ("https:///a.txt", "no address"),
        ("https://example.org/ä b.txt", "%20"),
        ("ftp://example.org/a.txt", "files of ftp:// cannot be read"),
    ):
        message = refused(find_files, "data.files", [url])
        assert words in message
        assert "secret" not in message
    # What the message says can be typed.
    assert parse(shlex.split(words_of_list)).data.files == ("@list.txt",)


def test_a_signature_in_an_address_is_not_shown(web):
    url = web.put("a.txt", b"text") + "?X-Signature=secret"
    (file,) = find_files("data.files", [url])
    assert file.name == "a.txt"
    assert "secret" not in str(file)
    del web.content["/a.txt"]
    assert "secret" not in refused(find_files, "data.files", [url])


def test_redirects_are_followed_but_not_to_other_protocols(web, copies):
    url = web.put("real.txt", b"text")
    web.faults["/a.txt"] = [url] * 3  # before, for the content, and after it
    (copy,) = copies.fetched(find_files("data.files", [f"{web.url}/a.txt"]))
    assert content_of(copy) == b"text"
    web.faults["/b.txt"] = ["file:///etc/passwd"]
    assert "leads" in refused(find_files, "data.files", [f"{web.url}/b.txt"])
    web.faults["/c.txt"] = [f"{web.url}/c.txt"] * 99
    assert "leads" in refused(find_files, "data.files", [f"{web.url}/c.txt"])
    asked = urllib.request.Request("https://example.org/a.txt")
    message = refused(_Redirects().redirect_request, asked, None, 302, "Found", {}, "http://example.org/a.txt")
    assert message == "https://example.org/a.txt: its server leads from https:// to http://; refused"


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("absent", [404, 403])
def test_what_only_may_lie_beside_a_file_stops_nobody_from_reading_it(web, tmp_path, capsys, has_head, absent):
    """A server that refuses HEAD, and a public bucket that says 403 of what is not there."""
    web.has_head, web.absent = has_head, absent
    urls = [web.put(f"{name}.bin", np.full(1000, name, "<u2").tobytes()) for name in range(3)]
    section = DataSection(
        source="tokens", files=(*urls,), cache_dir=str(tmp_path), validation_fraction=0.0, token_dtype="uint16"
    )
    data = open_data(section, seq_len=8, vocab_size=257, progress=False)
    assert data.train_tokens == 3000
    said = capsys.readouterr().err
    if absent == 404:
        assert said == ""
    else:
        assert said == (
            f"note: {web.url}/0.idx: access is refused, which may mean that it is not there; 0.bin is read without it; "
            "the same holds for 2 more files\n"
        )
    # The file itself must be there.
    if absent == 404:
        assert "no such file" in refused(find_files, "data.files", [f"{web.url}/9.bin"])
    else:
        assert "9.bin: access is refused (HTTP 403" in refused(find_files, "data.files", [f"{web.url}/9.bin"])


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_tokens_whose_index_is_forbidden_are_not_taken_for_numbers_of_another_width(web, tmp_path, dtype):
    """Megatron's tokens without their index: what is seen in them says that they are no uint16."""
    path = megatron(tmp_path, [[[*range(1, 200), 0]]] * 10, dtype)
    url = web.put("a.bin", path.read_bytes())
    web.faults["/a.idx"] = [403] * 2
    section = DataSection(source="tokens", files=(url,), cache_dir=str(tmp_path), validation_fraction=0.0)
    message = refused(open_data, section, seq_len=8, vocab_size=257, progress=False)
    assert message.startswith(f"{url}: ")
    assert "its numbers look like" in message or "data.token_dtype" in message


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
