"""The manifest of a directory of tokenized text: of which files and by which tokenizer its tokens were made, how much
text they stand for, which are held out, and the sizes and digests of all its files.

It is written last, so that a directory without one is not whole.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from hybridnorm_jax.config.data_file_names import MANIFEST
from hybridnorm_jax.whole_files import write_whole

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file that is written: its name, its bytes, the digest of its sampled content (identity.py) and its SHA-256."""

    name: str
    size: int
    digest: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """A shard: `tokens` with the separators, `pieces` that separators end, and its files; all tokens may be targets."""

    tokens: int
    pieces: int
    file: FileRecord
    ends: FileRecord
    targets: FileRecord | None = None


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

    def write(self, directory: pathlib.Path) -> None:
        """Write it as the file that makes the directory a whole one."""
        write_whole(directory / MANIFEST, json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The manifest that these bytes hold.

        Raises:
          ValueError: it is damaged, or of a format that is not known.
        """
        try:
            fields = json.loads(content)
            if fields.pop("format") != FORMAT:
                raise ValueError("of another version of this program")
            tokenizer = TokenizerRecord(**fields.pop("tokenizer"))
            splits = {split: SplitCounts(**counts) for split, counts in fields.pop("splits").items()}
            shards = {split: [_shard(one) for one in found] for split, found in fields.pop("shards").items()}
            return cls(tokenizer=tokenizer, splits=splits, shards=shards, **fields)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("damaged") from error

    @property
    def files(self) -> list[FileRecord]:
        """All files but the manifest itself."""
        records = [shard for shards in self.shards.values() for shard in shards]
        return [file for one in records for file in (one.file, one.ends, one.targets) if file is not None]


def _shard(content: dict[str, Any]) -> ShardRecord:
    names = [name for name in ("file", "ends", "targets") if content.get(name) is not None]
    files = {name: FileRecord(**content[name]) for name in names}
    for file in files.values():
        if not file.name or file.name != os.path.basename(file.name):
            raise ValueError(f"it names {file.name!r}, which is no file of its directory")
    return ShardRecord(**content | files)
