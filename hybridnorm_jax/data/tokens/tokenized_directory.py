"""A directory of tokenized text: shards of tokens, an index of document ends beside each, and a manifest.

    manifest.json
    train-00000.npy train-00000.ends.npy train-00001.npy ...
    validation-00000.npy validation-00000.ends.npy ...

`hybridnorm tokenize` and the cache of tokenized text write it (tokenizing.py).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnorm_jax.config.data_file_names import MANIFEST
from hybridnorm_jax.data.files.manifest import Manifest, ShardRecord, SplitCounts, TokenizerRecord
from hybridnorm_jax.data.files.tokenized_files import TokenizedFiles, tokenized_files
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.tokens.token_files import OpenFiles, open_token_file
from hybridnorm_jax.data.tokens.token_shards import SplitState
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class TokenizedDirectory(TokenizedFiles):
    """A whole directory of tokenized text, whose files are on this machine."""

    def stream(self, splits: Sequence[str], vocab_size: int, files: OpenFiles | None = None) -> TokenStream:
        """The tokens of splits, such as ["train"], one after the other."""
        return TokenStream(self.extents(splits, files), vocab_size)

    def extents(self, splits: Sequence[str], files: OpenFiles | None = None) -> tuple[Extent, ...]:
        """The shards of splits; `files`: those that are open at once."""
        files = files or OpenFiles()
        return tuple(_extent(shard, files) for shard in self.shards(splits))


def _extent(shard: Place, files: OpenFiles) -> Extent:
    array = open_token_file(shard, "uint16", files)
    return Extent(array, str(shard), 0, len(array), ends=array.ends, targets=array.targets)


def opened(found: TokenizedFiles) -> TokenizedDirectory:
    """A directory whose files are on this machine, after a look at their sampled content.

    Raises:
      DataError: its files are no longer what they were.
    """
    found.check_content()
    return TokenizedDirectory(found.path, found.manifest, found.places)


def open_tokenized(directory: str | os.PathLike[str]) -> TokenizedDirectory:
    """A directory that `hybridnorm tokenize` has written to a disk, after a look at the content of its files.

    Raises:
      DataError: it is not whole, or its files are no longer what they were.
    """
    found = tokenized_files(os.fspath(directory))
    if found is None:
        raise DataError(f"{directory}: no directory of tokens: it has no {MANIFEST}")
    return opened(found)


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
