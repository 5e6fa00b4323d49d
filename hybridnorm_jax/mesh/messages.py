"""Texts and bytes between the processes of a run. All processes call each function, in the same order."""

import jax
import numpy as np
from jax.experimental import multihost_utils

# Of what is sent from one process to all others; each holds a piece of this size on a device meanwhile.
PIECE_BYTES = 2**26


def all_texts(text: str) -> list[str]:
    """The texts of all processes, by their numbers."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int64(data.size))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def bytes_of(process: int, data: np.ndarray | None, size: int) -> np.ndarray:
    """`size` bytes that one process has, in every process.

    Args:
      data: in that process, uint8; in the others it is not looked at.
    """
    if jax.process_count() == 1:
        return data
    received = np.empty(size, np.uint8)
    is_source = jax.process_index() == process
    for begin in range(0, size, PIECE_BYTES):
        piece = received[begin : begin + PIECE_BYTES]
        sent = data[begin : begin + PIECE_BYTES] if is_source else np.zeros_like(piece)
        piece[:] = multihost_utils.broadcast_one_to_all(sent, is_source=is_source)
    return received


def text_of(process: int, text: str) -> str:
    """The text that one process has, in every process."""
    size = int(all_texts(str(len(text.encode())))[process])
    return bytes(bytes_of(process, np.frombuffer(text.encode(), np.uint8), size)).decode()
