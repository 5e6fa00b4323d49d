"""Directories of tokenized text as a source of data: which of their shards are trained on, and whether they belong to
the run's tokenizer and vocabulary.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from hybridnorm_jax.data.files.patterns import listed
from hybridnorm_jax.data.files.tokenized_files import TokenizedFiles, fetched, tokenized_files
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.remote_file import RemoteFile
from hybridnorm_jax.data.tokens.token_files import OpenFiles
from hybridnorm_jax.data.tokens.token_stream import TokenStream
from hybridnorm_jax.data.tokens.tokenized_directory import TokenizedDirectory, opened
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import is_local

BOTH = ("train", "validation")
NONE = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens of some splits of directories, and the bytes and words of text that they were made of."""

    stream: TokenStream
    bytes: int
    words: int


def directories_of(key: str, patterns: Iterable[str], copies: LocalCopies) -> tuple[TokenizedDirectory, ...]:
    """The directories of tokenized text that paths and URLs name, opened; none where all of them name other things.

    Args:
      key: names the patterns in messages.
      patterns: paths and URLs.
      copies: of the files of remote directories, which are fetched.

    Raises:
      DataError: a directory is not whole, or was changed; some paths are such directories and others are not; there is
        no room for the copies.
    """
    names = tuple(dict.fromkeys(listed(key, patterns)))
    found = {name: directory for name in names if (directory := tokenized_files(name))}
    if not found:
        return ()
    if len(found) < len(names):
        first, other = next(iter(found.values())).path, next(name for name in names if name not in found)
        shown = other if is_local(other) else RemoteFile(other, 0, "")
        wrong = f"{first} is a directory of tokenized text, whose manifest says what is held out, and {shown} is not"
        raise DataError(f"{key}: {wrong}; name directories only, or files only")
    distinct = {_identity(directory): directory for directory in found.values()}
    return tuple(opened(directory) for directory in fetched(distinct.values(), copies))


def _identity(directory: TokenizedFiles) -> str:
    """The place of its first file: a directory may be named in several ways."""
    first = os.fspath(next(iter(directory.places.values()), directory.path))
    return os.path.realpath(first) if is_local(first) else first


def part(
    directories: Sequence[TokenizedDirectory], splits: Sequence[str], *, vocab_size: int, files: OpenFiles
) -> Part:
    """All tokens of these splits, in the order of the directories."""
    extents = [extent for directory in directories for extent in directory.extents(splits, files)]
    counts = [directory.manifest.splits[split] for directory in directories for split in splits]
    num_bytes, num_words = sum(one.bytes for one in counts), sum(one.words for one in counts)
    return Part(TokenStream(tuple(extents), vocab_size), bytes=num_bytes, words=num_words)


def splits_of(directories: Sequence[TokenizedDirectory], fraction: float) -> tuple[Sequence[str], Sequence[str]]:
    """(the splits that are trained on, those that are held out).

    Raises:
      DataError: another share was held out when a directory was made.
    """
    if not fraction:
        return BOTH, NONE
    for directory in directories:
        held_out = directory.manifest.inputs["fraction"]
        if held_out != fraction:
            right = f"set data.validation_fraction={held_out}, or 0 to train on all of it, or tokenize again"
            wrong = f"{directory.path} was made with {held_out}, and its documents are divided so"
            raise DataError(f"data.validation_fraction={fraction}: {wrong}; {right}")
    return BOTH[:1], BOTH[1:]


def check_belongs(
    directories: Sequence[TokenizedDirectory],
    tokenizer: Tokenizer | None,
    *,
    key: str,
    separator_id: int | None,
    vocab_size: int,
) -> int:
    """The id that ends the documents of directories, which one tokenizer has made: the run's, where that is known.

    Raises:
      DataError: another tokenizer has made the tokens of one, or the model's vocabulary lacks some of them.
    """
    first = directories[0]
    for directory in directories:
        made_by = directory.manifest.tokenizer
        if made_by.fingerprint != (other := first.manifest.tokenizer).fingerprint:
            wrong = f"{directory.path} was made by the tokenizer {made_by.name}, {first.path} by {other.name}"
            raise DataError(f"{key}: {wrong}; ids of two tokenizers have nothing in common")
        if tokenizer is not None and tokenizer.fingerprint != made_by.fingerprint:
            wrong = f"the tokens of {directory.path} were made by another one, {made_by.name}"
            raise DataError(f"data.tokenizer={tokenizer.name}: {wrong}; name that one")
        if separator_id not in (None, made_by.separator_id):
            right = "set data.separator_id=null: the directory says it"
            wrong = f"{made_by.separator_id} ends the documents of {directory.path}"
            raise DataError(f"data.separator_id={separator_id}: {wrong}; {right}")
        if made_by.separator_id != first.manifest.tokenizer.separator_id:
            wrong = f"other ids end the documents of {directory.path} and of {first.path}"
            raise DataError(f"{key}: {wrong}; tokenize them with the same data.separator")
        if directory.manifest.max_id >= vocab_size:
            right = f"set model.vocab_size to at least {made_by.vocab_size}"
            wrong = f"its largest id {directory.manifest.max_id} does not fit model.vocab_size={vocab_size}"
            raise DataError(f"{directory.path}: {wrong}; {right}")
    return first.manifest.tokenizer.separator_id
