"""What a data file's name says: whether it holds text or tokens, and whether its text is records of JSON."""

PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*RECORD_SUFFIXES, ".txt", ".text", ".md")
TOKEN_SUFFIXES = (".npy", ".bin")


def source_of(name: str) -> str | None:
    """The data.source that reads a file of this name, in whatever case: text, tokens, or None where none is known."""
    name = name.lower()
    if name.endswith(TOKEN_SUFFIXES):
        return "tokens"
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return "text" if name.endswith(TEXT_SUFFIXES) else None
