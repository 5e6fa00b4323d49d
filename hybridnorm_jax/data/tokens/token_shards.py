"""The files that tokenized text is written to: shards of whole documents, each with its index of document ends.

    train-00000.npy train-00000.ends.npy train-00001.npy ... validation-00000.npy ...

and for records of which only a part is learned train-00000.targets.npy, with 1 for each token that is and 0 for others.

A shard ends after the document with which it reaches its length. So where the shards begin depends on the tokens alone.
What is written can be cut back to the state of an earlier moment, after a process was killed.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from typing import Any, Self

import numpy as np

from hybridnorm_jax.data.files.companions import ENDS, NUMPY, TARGETS, path_beside
from hybridnorm_jax.data.files.identity import file_identity
from hybridnorm_jax.data.files.manifest import FileRecord, ShardRecord
from hybridnorm_jax.data.tokens.document_ends import DTYPE
from hybridnorm_jax.errors import DataError

# Tokens of a shard: 256 MiB of uint16, or 512 MiB of uint32.
SHARD_TOKENS = 1 << 27
TARGETS_DTYPE = np.dtype("u1")


@dataclasses.dataclass
class SplitState:
    """How far a split is written.

    Attributes:
      shards: (tokens, pieces) of every shard; the last one may grow.
      bytes, words: of the text, in UTF-8 and as whitespace separates them.
      max_id: the largest id.
    """

    shards: list[list[int]] = dataclasses.field(default_factory=list)
    bytes: int = 0
    words: int = 0
    max_id: int = 0

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(tokens for tokens, _ in self.shards)

    @property
    def pieces(self) -> int:
        """Of all shards."""
        return sum(pieces for _, pieces in self.shards)


class _NumbersFile:
    """A 1-D .npy file that grows."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype, count: int):
        """Open a file that holds `count` numbers and is cut after them; with none it is made anew.

        Raises:
          DataError: it holds fewer.
        """
        self._dtype = dtype
        if count and path.stat().st_size < count * dtype.itemsize:
            raise DataError(f"{path}: is shorter than it was written; remove {path.parent} and begin again")
        self._stream = open(path, "r+b" if count else "wb")  # noqa: SIM115 - it stays open while it grows
        # NumPy leaves room in the header for the number to grow.
        self._write_header(count)
        self._stream.truncate(self._stream.tell() + count * dtype.itemsize)
        self._stream.seek(0, os.SEEK_END)

    def _write_header(self, count: int) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def write(self, numbers: np.ndarray) -> None:
        """Append numbers of the file's dtype."""
        self._stream.write(numbers.data)

    def flush(self) -> None:
        """Write everything to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self, count: int) -> None:
        """Note down the number in the header, and close the file."""
        self._stream.seek(0)
        self._write_header(count)
        self.flush()
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._stream.close()


class SplitWriter:
    """The shards of one split."""

    def __init__(
        self,
        directory: pathlib.Path,
        split: str,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        state: SplitState,
        has_targets: bool = False,
    ):
        """Go on from `state`: what the directory holds of this split beyond it is removed.

        Args:
          has_targets: whether only a part of the tokens is learned.
        """
        self._directory, self._split = directory, split
        self._has_targets = has_targets
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self.state = state
        self._files: list[_NumbersFile] | None = None
        known = {path for number in range(len(state.shards)) for path in self._paths(number)}
        for path in directory.glob(f"{split}-*.npy"):
            if path not in known:
                path.unlink()
        if state.shards and state.shards[-1][0] < shard_tokens:
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files or ():
            file.close()

    def _paths(self, number: int) -> list[pathlib.Path]:
        """Of a shard: its tokens, the ends of documents and, where there are any, the targets."""
        tokens = self._directory / f"{self._split}-{number:05}.npy"
        paths = [tokens, path_beside(tokens, NUMPY, ENDS)]
        return [*paths, path_beside(tokens, NUMPY, TARGETS)] if self._has_targets else paths

    def _counts(self) -> list[int]:
        """Numbers in the files of the last shard."""
        tokens, pieces = self.state.shards[-1]
        return [tokens, pieces, tokens] if self._has_targets else [tokens, pieces]

    def _open(self) -> None:
        paths, dtypes = self._paths(len(self.state.shards) - 1), (self._dtype, DTYPE, TARGETS_DTYPE)
        self._files = [
            _NumbersFile(path, dtype, count) for path, dtype, count in zip(paths, dtypes, self._counts(), strict=False)
        ]

    def write(self, ids: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Append ids of a document; `targets` says which are learned, where not all are."""
        if not len(ids):
            return
        if self._files is None:
            self.state.shards.append([0, 0])
            self._open()
        self._files[0].write(ids.astype(self._dtype, copy=False))
        if targets is not None:
            self._files[2].write(targets.astype(TARGETS_DTYPE))
        self.state.shards[-1][0] += len(ids)
        self.state.max_id = max(self.state.max_id, int(ids.max()))

    def end(self, separator: np.ndarray, targets: np.ndarray | None = None) -> None:
        """End a document, or what of one is in this split: append the separator, and note its place down."""
        self.write(separator, targets)
        shard = self.state.shards[-1]
        self._files[1].write(np.array([shard[0]], DTYPE))
        shard[1] += 1
        if shard[0] >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        for file, count in zip(self._files, self._counts(), strict=True):
            file.finish(count)
        self._files = None

    def flush(self) -> dict[str, Any]:
        """Write everything to the disk, and return the state."""
        for file in self._files or ():
            file.flush()
        return dataclasses.asdict(self.state)

    def finish(self, pool: concurrent.futures.Executor) -> list[ShardRecord]:
        """End the last shard, and return what is said of all of them; `pool` reads them."""
        if self._files is not None:
            self._finish_shard()
        paths = [path for number in range(len(self.state.shards)) for path in self._paths(number)]
        files = list(pool.map(_record, paths))
        each = len(files) // max(len(self.state.shards), 1)
        return [
            ShardRecord(
                tokens,
                pieces,
                file=files[number * each],
                ends=files[number * each + 1],
                targets=files[number * each + 2] if self._has_targets else None,
            )
            for number, (tokens, pieces) in enumerate(self.state.shards)
        ]


def _record(path: pathlib.Path) -> FileRecord:
    identity = file_identity(path)
    return FileRecord(identity.name, identity.size, identity.digest, sha256_of(path))


def sha256_of(path: pathlib.Path) -> str:
    """The SHA-256 of a whole file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
