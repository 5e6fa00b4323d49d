"""How a long file is cut into the blocks that are held out, and which blocks, documents or records are.

The length of a block depends on its place in the file alone, so that a file that grows keeps its blocks: short ones at
first, so that a share of a small file can be held out, and longer ones later, so that a large file has few cuts.
"""

from collections.abc import Iterator

KI = 1 << 10


def block_length(start: int) -> int:
    """Length of the block that begins at `start`, in tokens or in bytes of text."""
    if start < 64 * KI:
        return KI
    return 4 * KI if start < KI * KI else 64 * KI


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every block of a file with this many tokens."""
    start = 0
    while start < size:
        stop = min(start + block_length(start), size)
        yield start, stop
        start = stop


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether an identity with this SHA-256 digest belongs to the held-out `fraction`."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
