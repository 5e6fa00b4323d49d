"""Packed files: whole, bounded, and known by their content."""

import bz2
import gzip
import lzma
import os
import tracemalloc

import pytest
import zstandard
from etils import epath

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text import archives

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
CONTENT = bytes(range(256)) * 3000


def unpacked(path) -> bytes:
    return b"".join(archives.chunks(epath.Path(path)))


@pytest.mark.parametrize("suffix", PACKERS)
def test_streams_one_after_the_other_are_one_file(tmp_path, suffix):
    pack = PACKERS[suffix]
    (tmp_path / f"a{suffix}").write_bytes(pack(CONTENT) + pack(b"more"))
    assert unpacked(tmp_path / f"a{suffix}") == CONTENT + b"more"
    (tmp_path / "by_content").write_bytes(pack(CONTENT))
    assert unpacked(tmp_path / "by_content") == CONTENT


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kept", [-1, 100, 20])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    (tmp_path / f"a{suffix}").write_bytes(PACKERS[suffix](CONTENT)[:kept])
    with pytest.raises(DataError, match="damaged or truncated"):
        unpacked(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_name_that_promises_another_packing_is_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"plain text")
    with pytest.raises(DataError, match="it is not a file packed with"):
        unpacked(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_small_file_that_unpacks_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 4 << 20)
    (tmp_path / f"a{suffix}").write_bytes(PACKERS[suffix](bytes(64 << 20)))
    tracemalloc.start()
    with pytest.raises(DataError, match="unpack to more than"):
        for _ in archives.chunks(epath.Path(tmp_path / f"a{suffix}")):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 << 20


def test_a_frame_of_zstandard_may_ask_for_a_long_window(tmp_path):
    packing = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=packing).compressobj()  # size unknown: the window is kept
    (tmp_path / "a.zst").write_bytes(stream.compress(CONTENT) + stream.flush())
    assert unpacked(tmp_path / "a.zst") == CONTENT


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file"):
        unpacked(tmp_path / "pipe")
