"""The cache of tokenized text: one directory per fingerprint of everything that decides its content.

    <data.cache_dir>/<fingerprint>/train.npy train.ends.npy validation.npy validation.ends.npy meta.json

A directory is written under another name and renamed when it is whole. So one with its final name is complete, unless
somebody damaged it later. Where two processes write the same one, the second keeps what the first has written.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
from etils import epath
from tqdm import tqdm

from hybridnorm_jax.data.blocks import held_out
from hybridnorm_jax.data.cache_directory import cache_root, refusals_of_cache
from hybridnorm_jax.data.document_ends import DTYPE, ends_path, open_document_ends
from hybridnorm_jax.data.sources import Corpus, Document
from hybridnorm_jax.data.token_files import open_token_file
from hybridnorm_jax.data.tokenizers import LongTokens, Tokenizer
from hybridnorm_jax.data.whole_directories import whole_directory
from hybridnorm_jax.data.windows import Extent, TokenStream
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.streams import can_redraw
from hybridnorm_jax.whole_files import is_local

# Part of every fingerprint: raise it when the same inputs give other files than before.
FORMAT = 5
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 1 << 19
# A longer text is tokenized in pieces.
LONG_CHARACTERS = 1 << 18
# Where no bar is shown, a line says what takes longer than this.
QUIET_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What one split holds: `bytes` of UTF-8 text, `words` that whitespace separates, `tokens` with the separators.

    `pieces` are what separators end: a document, or blocks of one that follow each other.
    """

    pieces: int
    tokens: int
    bytes: int
    words: int


@dataclasses.dataclass(frozen=True)
class TextCache:
    """A complete cache directory.

    Attributes:
      directory: where it is.
      documents: of both splits together; one that is held out in blocks is still one.
      splits: what "train" and "validation" hold.
      max_id: the largest token id.
      is_split_by_hash: as in Data.
    """

    directory: pathlib.Path
    documents: int
    splits: dict[str, SplitCounts]
    max_id: int
    is_split_by_hash: bool

    def stream(self, split: str, vocab_size: int) -> TokenStream:
        """The tokens of "train" or "validation"."""
        if not self.splits[split].tokens:  # an empty file cannot be mapped
            return TokenStream((), vocab_size)
        path = self.directory / f"{split}.npy"
        array = open_token_file(epath.Path(path), "uint16")
        ends = open_document_ends(path, len(array))
        return TokenStream((Extent(array, str(path), 0, len(array), ends=ends),), vocab_size)


def open_text_cache(
    corpus: Corpus, tokenizer: Tokenizer, *, fraction: float, cache_dir: str, progress: bool
) -> TextCache:
    """The corpus as tokens, `fraction` of its documents in the split "validation", the others in "train".

    Each document is followed by the tokenizer's separator. Tokenizes only where no cache of the same inputs exists.

    Raises:
      DataError: text that cannot be read, a cache directory that cannot be written.
    """
    if not is_local(cache_dir):
        raise DataError(f"data.cache_dir={cache_dir}: the cache is memory-mapped; name a local directory")
    inputs = {
        "format": FORMAT,
        "corpus": corpus.name,
        "files": corpus.signature(),
        "text_field": corpus.text_field,
        "tokenizer": tokenizer.fingerprint,
        "separator": tokenizer.separator_id,
        "fraction": fraction,
    }
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    root = cache_root(cache_dir, fingerprint)
    directory = root / fingerprint
    with refusals_of_cache(root):
        cache = _open(directory)
        if cache is None:
            if directory.exists():
                print(f"{directory}: damaged cache; tokenizing again", file=sys.stderr)
                shutil.rmtree(directory)
            _build(directory, corpus, tokenizer, inputs, progress)
            cache = _open(directory)
    return cache


def _open(directory: pathlib.Path) -> TextCache | None:
    """The cache in a directory; None where there is none, or where its files no longer have the sizes they had."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        sizes = {name: (directory / name).stat().st_size for name in meta["file_sizes"]}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if sizes != meta["file_sizes"]:
        return None
    splits = {split: SplitCounts(**meta["splits"][split]) for split in SPLITS}
    return TextCache(directory, meta["documents"], splits, meta["max_id"], meta["is_split_by_hash"])


def _build(directory: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer, inputs: dict, progress: bool) -> None:
    with whole_directory(directory, is_whole=lambda: _open(directory) is not None) as partial:
        meta = {"inputs": inputs, **_tokenize(partial, corpus, tokenizer, inputs["fraction"], progress)}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))


def _tokenize(partial: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer, fraction: float, progress: bool) -> dict:
    """Write both splits' token files, and return what meta.json says of them."""
    seen = _Seen()
    meta = _write(
        partial, corpus, tokenizer, fraction, seen.choose(lambda digest: held_out(digest, fraction)), progress
    )
    if fraction in (0, 1) or len(seen.sides) == 2:
        return {**meta, "is_split_by_hash": True}
    if seen.least == seen.most:
        what = "all documents are the same" if seen.count > 1 else "there is one document, or one block of lines, only"
        right = "give more text, or set it to 0 and name files in data.validation"
        raise DataError(f"data.validation_fraction={fraction}: {what}, and of one nothing can be held out; {right}")
    # Few documents: the hash has chosen none of them, or all. One is held out then, or one is trained on.
    if seen.sides == {False}:
        meta = _write(partial, corpus, tokenizer, fraction, lambda digest: digest == seen.least, progress)
    else:
        meta = _write(partial, corpus, tokenizer, fraction, lambda digest: digest != seen.most, progress)
    return {**meta, "is_split_by_hash": False}


class _Seen:
    """What was chosen of which documents."""

    def __init__(self):
        self.sides: set[bool] = set()
        self.count = 0
        self.least = b"\xff" * 32
        self.most = b""

    def choose(self, is_held_out: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        """The same choice, which is noted down."""

        def chosen(digest: bytes) -> bool:
            side = is_held_out(digest)
            self.sides.add(side)
            self.count += 1
            self.least, self.most = min(self.least, digest), max(self.most, digest)
            return side

        return chosen


def _write(
    partial: pathlib.Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    fraction: float,
    is_held_out: Callable[[bytes], bool],
    progress: bool,
) -> dict:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(_TokenWriter(partial / f"{split}.npy", dtype, tokenizer.separator_id))
            for split in SPLITS
        }
        texts = _Texts(tokenizer, writers)
        shows_bar = progress and can_redraw(sys.stderr)
        is_quiet, began = progress and not shows_bar, time.monotonic()
        files = stack.enter_context(tqdm(corpus.files, "tokenizing", unit="file", leave=False, disable=not shows_bar))
        whole = corpus.holds_whole_files_out(fraction)
        documents = 0
        for file in files:
            for document in corpus.documents(file, whole=whole):
                documents += not document.continues
                if is_quiet and time.monotonic() - began > QUIET_SECONDS:
                    print(f"tokenizing {corpus.name}", file=sys.stderr, flush=True)
                    is_quiet = False
                if texts.add("validation" if is_held_out(document.digest) else "train", document):
                    files.set_postfix_str(f"{sum(writer.tokens for writer in writers.values()):,} tokens")
        texts.finish()
    return {
        "file_sizes": {path.name: path.stat().st_size for writer in writers.values() for path in writer.paths},
        "documents": documents,
        "max_id": max(writer.max_id for writer in writers.values()),
        "splits": {split: dataclasses.asdict(writer.counts) for split, writer in writers.items()},
    }


class _Texts:
    """Documents on their way to the two splits: short ones are tokenized many at once, a long one in pieces.

    Blocks that follow each other in a file, and in a split, are one text.
    """

    def __init__(self, tokenizer: Tokenizer, writers: dict[str, "_TokenWriter"]):
        self._tokenizer = tokenizer
        self._writers = writers
        self._batch: list[tuple[str, str]] = []
        self._batch_characters = 0
        # The text that may go on: its split, and its parts as long as it is short.
        self._split = ""
        self._parts: list[str] = []
        self._characters = 0
        self._long: LongTokens | None = None

    def add(self, split: str, document: Document) -> bool:
        """The next document or block; returns whether something was written."""
        before = self._writers["train"].tokens + self._writers["validation"].tokens
        if not (document.continues and split == self._split):
            self._end()
            self._split = split
        self._writers[split].bytes += document.num_bytes
        self._writers[split].words += len(document.text.split())
        self._parts.append(document.text)
        self._characters += len(document.text)
        if self._long is None and self._characters > LONG_CHARACTERS:
            self._flush()
            self._long = self._tokenizer.long_text()
        if self._long is not None:
            for text in self._parts:
                for part in _parts(text):
                    self._writers[split].write(self._long.feed(part))
            self._parts = []
        return self._writers["train"].tokens + self._writers["validation"].tokens > before

    def finish(self) -> None:
        """No document follows."""
        self._end()
        self._flush()

    def _end(self) -> None:
        if self._long is not None:
            self._writers[self._split].write(self._long.finish())
            self._writers[self._split].end()
        elif self._parts:
            self._batch.append((self._split, "".join(self._parts)))
            self._batch_characters += self._characters
            if self._batch_characters >= BATCH_CHARACTERS:
                self._flush()
        self._split, self._parts, self._characters, self._long = "", [], 0, None

    def _flush(self) -> None:
        encoded = self._tokenizer.encode_batch([text for _, text in self._batch])
        for (split, _), ids in zip(self._batch, encoded, strict=True):
            self._writers[split].write([ids])
            self._writers[split].end()
        self._batch, self._batch_characters = [], 0


def _parts(text: str) -> Iterator[str]:
    for start in range(0, len(text), LONG_CHARACTERS):
        yield text[start : start + LONG_CHARACTERS]


class _NumbersFile:
    """A 1-D .npy file that grows."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        self.path = path
        self.dtype = dtype
        self.count = 0

    def __enter__(self) -> Self:
        self._stream = open(self.path, "wb")
        self._write_header()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stream:
            if kind is None:
                # NumPy leaves room in the header for the number of tokens to grow.
                self._stream.seek(0)
                self._write_header()
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def write(self, numbers: np.ndarray) -> None:
        """Append numbers of the file's dtype."""
        self._stream.write(numbers.data)
        self.count += len(numbers)


class _TokenWriter:
    """The tokens of a split, and the index of their document ends."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype, separator_id: int):
        self._tokens = _NumbersFile(path, dtype)
        self._ends = _NumbersFile(ends_path(path), DTYPE)
        self._separator = np.array([separator_id], dtype)
        self.paths = (path, ends_path(path))
        self.bytes = 0
        self.words = 0
        self.max_id = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tokens)
            stack.enter_context(self._ends)
            self._files = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    @property
    def tokens(self) -> int:
        """How many were written."""
        return self._tokens.count

    def write(self, pieces: list[np.ndarray]) -> None:
        """Append ids."""
        for ids in pieces:
            part = ids.astype(self._tokens.dtype)
            self._tokens.write(part)
            self.max_id = max(self.max_id, int(part.max(initial=0)))

    def end(self) -> None:
        """End a document, or what of one is in this split: append the separator."""
        self.write([self._separator])
        self._ends.write(np.array([self.tokens], DTYPE))

    @property
    def counts(self) -> SplitCounts:
        """What was written so far."""
        return SplitCounts(self._ends.count, self.tokens, self.bytes, self.words)
