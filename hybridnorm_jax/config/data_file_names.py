"""What a data file's name says: whether it holds text or tokens, and in which format."""

PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
# Tar archives whose name says in one word how they are packed.
PACKED_TAR_SUFFIXES = (".tgz", ".tbz2", ".txz", ".tzst")
TAR_SUFFIXES = (".tar", *PACKED_TAR_SUFFIXES)
PLAIN_SUFFIXES = (".txt", ".text", ".md")
TEXT_SUFFIXES = (*RECORD_SUFFIXES, *TABLE_SUFFIXES, *TAR_SUFFIXES, *PLAIN_SUFFIXES)
TOKEN_SUFFIXES = (".npy", ".bin")


def source_of(name: str) -> str | None:
    """The data.source that reads a file of this name, in whatever case: text, tokens, or None where none is known."""
    name = name.lower()
    if name.endswith(TOKEN_SUFFIXES):
        return "tokens"
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return "text" if name.endswith(TEXT_SUFFIXES) else None
