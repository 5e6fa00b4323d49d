"""Which source each row of a run is of, and which row of that source: closed forms, so that nothing is stored.

Rows are counted over the whole run. A stage begins at a row and gives each source a share of the rows. How many of the
first n rows of a stage a source has follows from n alone: the sources are split into two halves, of which the first has
round(n share / (share of both)) of the rows, and so on in each half. These numbers only grow with n, and none is ever
further from n times its share than half a row for each of the log2(sources) times that it was split. So after the same
number of rows any two runs have read the same, whatever their batches are and whatever they resume from.

Dealt out in that order, two sources of the same share would alternate, and of every batch the same devices would read
the same source. So the rows of a batch are permuted. The permutation follows from the seed and the batch's first row.

Grain's MapDataset.mix has such a closed form too, but rounds every share to a hundredth of the smallest one.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# A share is a whole number of 2^-BITS. A row's place in a chunk times such a number fits 64 bits.
BITS = 40
# So many rows are dealt out at a time, and so many such stretches are kept for the next batches.
CHUNK = 1024
KEPT = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of a run in which the shares of the sources stay the same.

    Attributes:
      first: its first row.
      shares: of each source, at least 0; their sum needs not be 1.
    """

    first: int
    shares: tuple[float, ...]


class Assigned(NamedTuple):
    """The source of each row of a batch, by its number, and which of its own rows that source gives: 0, 1, 2, ..."""

    source: Int[np.ndarray, " rows"]
    index: Int[np.ndarray, " rows"]


class Allotment:
    """The rows of a run, dealt out to its sources."""

    def __init__(self, stages: Sequence[Stage], seed: int):
        """Prepare.

        Args:
          stages: in their order, the first one from row 0 on.
          seed: of the order inside of a batch.
        """
        self._seed = seed
        self._sources = len(stages[0].shares)
        self._firsts = [stage.first for stage in stages]
        self._splits = [_split(_present(stage.shares)) for stage in stages]
        self._before = [np.zeros(self._sources, np.int64)]
        for number, stage in enumerate(stages[1:]):
            self._before.append(self._taken(number, stage.first - stages[number].first))
        self._chunk = functools.lru_cache(maxsize=KEPT)(self._dealt)

    def taken(self, rows: int) -> Int[np.ndarray, " sources"]:
        """How many rows of each source are among the first `rows` of the run, which are whole batches."""
        number = self._stage_of(rows)
        return self._taken(number, rows - self._firsts[number])

    def batch(self, start: int, stop: int) -> Assigned:
        """Rows [start, stop) of the run, which are a batch."""
        chunks = [self._chunk(number) for number in range(start // CHUNK, -(-stop // CHUNK))]
        mine = slice(start % CHUNK, start % CHUNK + stop - start)
        # The numbers of Philox are the same in every version of NumPy, which a permutation of its Generator may not be.
        random = np.random.Philox(np.random.SeedSequence((self._seed, start))).random_raw(stop - start)
        order = np.argsort(random, kind="stable")
        return Assigned(*(np.concatenate(arrays)[mine][order] for arrays in zip(*chunks, strict=True)))

    def _dealt(self, number: int) -> Assigned:
        """The rows of a stretch of CHUNK, whatever the batches are: one after the other, they need less time."""
        start, stop = number * CHUNK, (number + 1) * CHUNK
        dealt = Assigned(*np.empty((2, CHUNK), np.int64))
        done = start
        while done < stop:
            stage = self._stage_of(done)
            first = self._firsts[stage]
            end = min(stop, self._firsts[stage + 1]) if stage + 1 < len(self._firsts) else stop
            places = np.arange(done - start, end - start)
            _deal(self._splits[stage], done - first, end - first, places, dealt)
            dealt.index[places] += self._before[stage][dealt.source[places]]
            done = end
        return dealt

    def _stage_of(self, row: int) -> int:
        return bisect.bisect_right(self._firsts, row) - 1

    def _taken(self, number: int, rows: int) -> Int[np.ndarray, " sources"]:
        """`taken` of the first `rows` of a stage, those of the stages before it included."""
        counts = self._before[number].copy()
        open_splits = [(self._splits[number], rows)]
        while open_splits:
            split, count = open_splits.pop()
            if isinstance(split, int):
                counts[split] += count
            else:
                of_first = split.of_first(count)
                open_splits += [(split.first, of_first), (split.second, count - of_first)]
        return counts


@dataclasses.dataclass(frozen=True)
class _Split:
    """Sources in two halves: of n rows the first half has (n share + 2^(BITS-1)) // 2^BITS."""

    share: int
    first: "_Split | int"
    second: "_Split | int"

    def of_first(self, rows: int) -> int:
        """How many of the first `rows` the first half has. Python's integers do not overflow."""
        return (rows * self.share + (1 << BITS - 1)) >> BITS


def _present(shares: Sequence[float]) -> list[tuple[int, float]]:
    """The sources with a share, by number: those without one change nothing for the others."""
    return [(number, share) for number, share in enumerate(shares) if share > 0]


def _split(shares: Sequence[tuple[int, float]]) -> _Split | int:
    if len(shares) == 1:
        return shares[0][0]
    middle = len(shares) // 2
    first, second = shares[:middle], shares[middle:]
    sum_of_first, sum_of_second = (sum(share for _, share in half) for half in (first, second))
    share = round(sum_of_first / (sum_of_first + sum_of_second) * (1 << BITS))
    return _Split(min(max(share, 1), (1 << BITS) - 1), _split(first), _split(second))


def _deal(split: _Split | int, start: int, stop: int, places: Int[np.ndarray, " part"], dealt: Assigned) -> None:
    """Write which sources rows [start, stop) of a split are of, and which of their rows, to these places."""
    if isinstance(split, int):
        dealt.source[places] = split
        dealt.index[places] = np.arange(start, stop)
        return
    whole, rest = divmod(start * split.share + (1 << BITS - 1), 1 << BITS)
    counts = whole + ((rest + np.arange(stop - start + 1) * split.share) >> BITS)
    is_first = np.diff(counts) > 0
    begin, end = int(counts[0]), int(counts[-1])
    _deal(split.first, begin, end, places[is_first], dealt)
    _deal(split.second, start - begin, stop - end, places[~is_first], dealt)
