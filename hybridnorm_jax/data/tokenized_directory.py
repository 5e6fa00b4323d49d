"""A directory of tokenized text: shards of tokens, an index of document ends beside each, and a manifest.

    manifest.json
    train-00000.npy train-00000.ends.npy train-00001.npy ...
    validation-00000.npy validation-00000.ends.npy ...

`hybridnorm tokenize` and the cache of tokenized text write it (tokenizing.py). The manifest is written last, so that a
directory without one is not whole. It says of which files and by which tokenizer the tokens were made, how much text
they stand for, which are held out, and the sizes and digests of all files.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from etils import epath

from hybridnorm_jax.config.data_file_names import MANIFEST, UNFINISHED
from hybridnorm_jax.data.identity import FileIdentity, identities
from hybridnorm_jax.data.token_files import OpenFiles, TokenFile, open_token_file
from hybridnorm_jax.data.token_shards import FileRecord, ShardRecord, SplitState
from hybridnorm_jax.data.tokenizers import Tokenizer
from hybridnorm_jax.data.windows import Extent, TokenStream
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import write_whole

FORMAT = 1


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
class TokenizerRecord:
    """The tokenizer that made the ids; attributes as of Tokenizer."""

    name: str
    fingerprint: str
    vocab_size: int
    separator_id: int | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of tokenized text says of itself.

    Attributes:
      inputs: everything that decides what the files hold: names, sizes and digests of the text files among it.
      tokenizer: who made the ids.
      documents: of both splits together; one that is held out in blocks is still one.
      duplicates: documents that were dropped because their text came before.
      is_split_by_hash: whether it is the hash of a document, or of a block, alone that holds it out.
      max_id: the largest id.
      splits: what "train" and "validation" hold.
      shards: of "train" and "validation", in their order.
    """

    inputs: Mapping[str, Any]
    tokenizer: TokenizerRecord
    documents: int
    duplicates: int
    is_split_by_hash: bool
    max_id: int
    splits: Mapping[str, SplitCounts]
    shards: Mapping[str, Sequence[ShardRecord]]

    @classmethod
    def of(
        cls,
        *,
        inputs: Mapping[str, Any],
        tokenizer: Tokenizer,
        states: Mapping[str, SplitState],
        shards: Mapping[str, Sequence[ShardRecord]],
        **others: Any,
    ) -> Self:
        """Of what was written."""
        record = TokenizerRecord(tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.separator_id)
        splits = {
            split: SplitCounts(pieces=state.pieces, tokens=state.tokens, bytes=state.bytes, words=state.words)
            for split, state in states.items()
        }
        max_id = max(state.max_id for state in states.values())
        return cls(inputs=inputs, tokenizer=record, splits=splits, shards=shards, max_id=max_id, **others)

    def write(self, directory: pathlib.Path) -> None:
        """Write it as the file that makes the directory a whole one."""
        write_whole(directory / MANIFEST, json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Self:
        """The manifest of a directory.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is damaged, or of a format that is not known.
        """
        content = json.loads((pathlib.Path(directory) / MANIFEST).read_text(encoding="utf-8"))
        try:
            if content.pop("format") != FORMAT:
                raise ValueError("of another version of this program")
            tokenizer = TokenizerRecord(**content.pop("tokenizer"))
            splits = {split: SplitCounts(**counts) for split, counts in content.pop("splits").items()}
            shards = {split: [_shard(one) for one in found] for split, found in content.pop("shards").items()}
            return cls(tokenizer=tokenizer, splits=splits, shards=shards, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("damaged") from error

    @property
    def files(self) -> list[FileRecord]:
        """All files but the manifest itself."""
        records = [shard for shards in self.shards.values() for shard in shards]
        return [file for one in records for file in (one.file, one.ends, one.targets) if file is not None]


def _shard(content: dict[str, Any]) -> ShardRecord:
    names = [name for name in ("file", "ends", "targets") if content.get(name) is not None]
    return ShardRecord(**content | {name: FileRecord(**content[name]) for name in names})


@dataclasses.dataclass(frozen=True)
class TokenizedDirectory:
    """A whole directory of tokenized text."""

    path: pathlib.Path
    manifest: Manifest

    def stream(self, splits: Sequence[str], vocab_size: int, files: OpenFiles | None = None) -> TokenStream:
        """The tokens of splits, such as ["train"], one after the other."""
        return TokenStream(self.extents(splits, files), vocab_size)

    def extents(self, splits: Sequence[str], files: OpenFiles | None = None) -> tuple[Extent, ...]:
        """The shards of splits; `files`: those that are open at once."""
        files = files or OpenFiles()
        return tuple(_extent(self.path, shard, files) for split in splits for shard in self.manifest.shards[split])


def _extent(directory: pathlib.Path, shard: ShardRecord, files: OpenFiles) -> Extent:
    def opened(file: FileRecord) -> TokenFile:
        return open_token_file(epath.Path(directory / file.name), "uint16", files)

    array, path = opened(shard.file), directory / shard.file.name
    return Extent(
        array,
        os.fspath(path),
        0,
        len(array),
        ends=array.ends,
        targets=None if shard.targets is None else opened(shard.targets),
    )


def open_tokenized(directory: str | os.PathLike[str]) -> TokenizedDirectory:
    """A directory that `hybridnorm tokenize` has written, after a look at the sizes and sampled content of its files.

    Raises:
      DataError: it is not whole, or its files are no longer what they were.
    """
    path = pathlib.Path(directory)
    try:
        manifest = Manifest.read(path)
    except FileNotFoundError as error:
        if (path / UNFINISHED).is_file():
            right = "`hybridnorm tokenize` with the same arguments goes on"
            raise DataError(f"{path}: is not whole: it was stopped while it was written; {right}") from error
        raise DataError(f"{path}: no directory of tokens: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path / MANIFEST}: cannot be read ({error}); make the directory again") from error
    _check_files(path, manifest.files)
    return TokenizedDirectory(path, manifest)


def shards_of(directory: str | os.PathLike[str]) -> list[epath.Path]:
    """The files of tokens of a directory, those of "train" first, after a look at all of its files."""
    opened = open_tokenized(directory)
    return [epath.Path(opened.path / one.file.name) for shards in opened.manifest.shards.values() for one in shards]


def _check_files(path: pathlib.Path, files: Sequence[FileRecord]) -> None:
    paths = [path / file.name for file in files]
    for one in paths:
        if not one.is_file():
            raise DataError(f"{one}: is missing, but {path / MANIFEST} names it; copy the whole directory again")
    for found, file in zip(identities(paths, path), files, strict=True):
        if found != FileIdentity(file.name, file.size, file.digest):
            wrong = f"is not the file that {path / MANIFEST} names: it has changed, or was not copied whole"
            raise DataError(f"{path / file.name}: {wrong}; make or copy the directory again")
