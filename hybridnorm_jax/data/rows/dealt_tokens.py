"""How many tokens the rows hold that a run has read of a source: exact after every row, and without reading them."""

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.data.rows.permutation import permuted

# Places that are permuted at a time: what they need stays in a core's cache.
STRETCH = 1 << 16


class DealtTokens:
    """The tokens of the first rows of an EpochOrder.

    Where rows are not full, each holds another number of tokens, and which rows come first in an epoch follows from
    its seed. They are added up from the nearest number that is known: that of the last question, or one of the two
    ends of the epoch.
    """

    def __init__(self, order: EpochOrder, *, seq_len: int):
        self._order = order
        self._seq_len = seq_len
        self._all: int | None = None
        self._epoch = -1
        # Place in this epoch -> the tokens of the rows before it.
        self._known: dict[int, int] = {}

    def of_first(self, rows: int) -> int:
        """The tokens of the first `rows` rows, over all epochs: at once if the last question was of a near one."""
        tokens = self._order.rows.tokens_of_rows
        if tokens is None:
            return rows * self._seq_len
        epoch, place = divmod(rows, len(tokens))
        if self._all is None:
            self._all = int(tokens.sum(dtype=np.int64))
        if epoch != self._epoch:
            self._epoch, self._known = epoch, {0: 0, len(tokens): self._all}
        return epoch * self._all + self._within(tokens, place)

    def _within(self, tokens: Int[np.ndarray, " rows"], place: int) -> int:
        """The tokens of the first rows of the epoch."""
        nearest = min(self._known, key=lambda known: abs(known - place))
        before = self._known[nearest]
        if nearest <= place:
            found = before + self._between(tokens, nearest, place)
        else:
            found = before - self._between(tokens, place, nearest)
        self._known = {end: self._known[end] for end in (0, len(tokens))} | {place: found}
        return found

    def _between(self, tokens: Int[np.ndarray, " rows"], start: int, stop: int) -> int:
        keys = {"count": len(tokens), "seed": self._order.shuffle_seed(self._epoch), "rounds": self._order.rounds}
        found = 0
        for first in range(start, stop, STRETCH):
            places = np.arange(first, min(first + STRETCH, stop))
            found += int(tokens[permuted(places, **keys)].sum(dtype=np.int64))
        return found
