"""In which order a run reads the rows of its sources: row r of the run is a row of a source, computed from r."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hybridnorm_jax.data.rows.allotment import Allotment
from hybridnorm_jax.data.rows.permutation import permuted_place
from hybridnorm_jax.data.rows.rows import Rows


class Place(NamedTuple):
    """A row of a source, read for the `epoch`-th time; `seed` and epoch decide what is drawn in it by chance."""

    rows: Rows
    index: int
    seed: int
    epoch: int


class Order(Protocol):
    """The rows of a run, without an end."""

    def places(self, start: int, stop: int, wanted: Sequence[int]) -> list[Place]:
        """Where some rows of a batch are.

        Args:
          start, stop: the batch is the rows [start, stop) of the run.
          wanted: which rows of the batch, counted from its first.
        """


class EpochOrder:
    """All rows of one source, again and again, each time in another order that follows from the seed."""

    def __init__(self, rows: Rows, seed: int, *, rounds: int):
        """`rounds` of the cipher that is an epoch's permutation; train.shuffle_rounds."""
        self.rounds = rounds
        self.rows = rows
        self._count = len(rows)
        # The seed of an epoch is this one + the epoch: hashed, seeds 0 and 1 do not share their epochs.
        self._seed = seed
        self._shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def place(self, row: int) -> Place:
        """Where a row is; they are counted from 0 over all epochs.

        With 4 rounds it is what grain.MapDataset.range(count).shuffle(seed).repeat() gives, in half of its time (for
        some counts Grain leaves a row out: permutation.py). But
        so few rounds leave batches of more than about 30,000 rows with neighbours from the same part of the data, and
        two epochs of 250 million rows alike. From 8 rounds on nearly nothing of this can be measured, and with 16
        nothing.
        """
        epoch, place = divmod(row, self._count)
        index = permuted_place(place, count=self._count, seed=self.shuffle_seed(epoch), rounds=self.rounds)
        return Place(self.rows, index, self._seed, epoch)

    def shuffle_seed(self, epoch: int) -> int:
        """The seed of an epoch's permutation."""
        return (self._shuffle_seed + epoch) % 2**32

    def places(self, start: int, stop: int, wanted: Sequence[int]) -> list[Place]:
        """See Order."""
        return [self.place(start + row) for row in wanted]


class MixtureOrder:
    """The rows of several sources, each in its own order of epochs, dealt out as an Allotment says."""

    def __init__(self, sources: Sequence[EpochOrder], allotment: Allotment):
        """`sources` by their number in the allotment."""
        self._sources = sources
        self._allotment = allotment

    def places(self, start: int, stop: int, wanted: Sequence[int]) -> list[Place]:
        """See Order."""
        batch = self._allotment.batch(start, stop)
        mine = np.asarray(wanted)
        pairs = zip(batch.source[mine].tolist(), batch.index[mine].tolist(), strict=True)
        return [self._sources[source].place(index) for source, index in pairs]


def seed_of_source(seed: int, name: str) -> int:
    """The seed of a source of a mixture: of its name, so that another source beside it changes nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
