"""A directory of tokenized text: shards of tokens, an index of document ends beside each, and a manifest.

    manifest.json
    train-00000.npy train-00000.ends.npy train-00001.npy ...
    validation-00000.npy validation-00000.ends.npy ...

`hybridnorm tokenize` and the cache of tokenized text write it (tokenizing.py).
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from hybridnorm_jax.data.files.manifest import (
    Manifest,
    ShardRecord,
    SplitCounts,
    TokenizerRecord,
    checked_manifest,
)
from hybridnorm_jax.data.tokens.token_files import OpenFiles, open_token_file
from hybridnorm_jax.data.tokens.token_shards import SplitState
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer


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
    path = directory / shard.file.name
    array = open_token_file(epath.Path(path), "uint16", files)
    return Extent(array, os.fspath(path), 0, len(array), ends=array.ends, targets=array.targets)


def open_tokenized(directory: str | os.PathLike[str]) -> TokenizedDirectory:
    """A directory that `hybridnorm tokenize` has written, after a look at the sizes and sampled content of its files.

    Raises:
      DataError: it is not whole, or its files are no longer what they were.
    """
    return TokenizedDirectory(pathlib.Path(directory), checked_manifest(directory))


def manifest_of(
    *,
    inputs: Mapping[str, Any],
    tokenizer: Tokenizer,
    states: Mapping[str, SplitState],
    shards: Mapping[str, Sequence[ShardRecord]],
    **others: Any,
) -> Manifest:
    """The manifest of what was written."""
    record = TokenizerRecord(tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.separator_id)
    splits = {
        split: SplitCounts(pieces=state.pieces, tokens=state.tokens, bytes=state.bytes, words=state.words)
        for split, state in states.items()
    }
    max_id = max(state.max_id for state in states.values())
    return Manifest(inputs=inputs, tokenizer=record, splits=splits, shards=shards, max_id=max_id, **others)
