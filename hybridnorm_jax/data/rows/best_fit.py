"""Which documents share a row: best-fit decreasing, by classes of equal length.

The longest document comes first, and each goes to the row with the least room that it fits; only where it fits none, a
new row begins. "Fewer Truncations Improve Language Modeling" (2404.10830) packs so, and finds hardly any padding.
"""

import numpy as np
from jaxtyping import Int


def best_fit_decreasing(lengths: Int[np.ndarray, " items"], capacity: int) -> Int[np.ndarray, " items"]:
    """The number of the row of every item; rows are numbered from 0.

    Items of one length are placed together, and so are rows with the same room, so that the time does not grow with
    their number in Python, only with the number of different lengths.

    Args:
      lengths: from 1 to `capacity`.
      capacity: of a row.
    """
    rows_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    distinct, starts = np.unique(-lengths[order], return_index=True)
    rows = _Rows(capacity)
    stops = [*starts.tolist(), len(order)][1:]
    for length, start, stop in zip((-distinct).tolist(), starts.tolist(), stops, strict=True):
        items, placed = order[start:stop], 0
        while placed < len(items):
            taken = rows.take(length, len(items) - placed)
            rows_of[items[placed : placed + len(taken)]] = taken
            placed += len(taken)
    return rows_of


class _Rows:
    """Rows by the room that is left in them."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._count = 0
        self._by_room: dict[int, list[np.ndarray]] = {}
        # Bit r is set where some row has room r: the least room that is large enough is found without a search.
        self._rooms = 0

    def take(self, length: int, most: int) -> Int[np.ndarray, " taken"]:
        """The rows of the next items of one length, at least one of them and at most `most`.

        As many rows as needed get as many of them as they have room for: the row that was filled last has, of all that
        are large enough, the least room, until it is too small itself.
        """
        large_enough = self._rooms >> length
        if large_enough:
            room = length + (large_enough & -large_enough).bit_length() - 1
            rows = self._remove(room)
        else:
            room = self._capacity
            count = -(-most // (room // length))
            rows = np.arange(self._count, self._count + count)
            self._count += count
        each = room // length
        used = min(len(rows), -(-most // each))
        taken = np.repeat(rows[:used], each)[:most]
        in_last = len(taken) - (used - 1) * each
        self._add(room - each * length, rows[: used - 1])
        self._add(room - in_last * length, rows[used - 1 : used])
        self._add(room, rows[used:])
        return taken

    def _remove(self, room: int) -> Int[np.ndarray, " rows"]:
        self._rooms &= ~(1 << room)
        return np.concatenate(self._by_room.pop(room))

    def _add(self, room: int, rows: Int[np.ndarray, " rows"]) -> None:
        if len(rows) and room:
            self._by_room.setdefault(room, []).append(rows)
            self._rooms |= 1 << room
