"""What a data file's name says: whether it holds text or tokens, and in which format.

The one thing that is looked for on disk is a directory of tokenized text, whose name says nothing. At a URL nothing is
looked for: there a name without an ending is such a directory's, the only kind that is read from a remote place.
"""

import os
import posixpath

from hybridnorm_jax.whole_files import is_local

PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
# Tar archives whose name says in one word how they are packed.
PACKED_TAR_SUFFIXES = (".tgz", ".tbz2", ".txz", ".tzst")
TAR_SUFFIXES = (".tar", *PACKED_TAR_SUFFIXES)
PLAIN_SUFFIXES = (".txt", ".text", ".md")
TEXT_SUFFIXES = (*RECORD_SUFFIXES, *TABLE_SUFFIXES, *TAR_SUFFIXES, *PLAIN_SUFFIXES)
TOKEN_SUFFIXES = (".npy", ".bin")
# One of them is in every directory of tokenized text: in a whole one, and in one that was begun.
MANIFEST, UNFINISHED = "manifest.json", "unfinished.sqlite"


def source_of(name: str) -> str | None:
    """The data.source that reads a file of this name, in whatever case: text, tokens, or None where none is known."""
    if is_local(name) and is_tokenized(os.path.expanduser(name)):
        return "tokens"
    return source_of_ending(name) or ("tokens" if _is_remote_directory_name(name) else None)


def source_of_ending(name: str) -> str | None:
    """What the ending of a path or URL says; as source_of."""
    name = _path_of(name).lower()
    if name.endswith(TOKEN_SUFFIXES):
        return "tokens"
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def _is_remote_directory_name(name: str) -> bool:
    """Whether a URL ends with `/`, or in a name without an ending. A pattern of a bucket names files."""
    path = _path_of(name)
    last = posixpath.basename(path)
    return not is_local(name) and not set(last) & set(".*?[")


def _path_of(name: str) -> str:
    """A path or URL without the query of a web address."""
    return name.partition("?")[0] if name.lower().startswith(("http://", "https://")) else name


def is_tokenized(directory: str | os.PathLike[str]) -> bool:
    """Whether this is a directory that `hybridnorm tokenize` has written, or begun."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (MANIFEST, UNFINISHED))
