"""Batches: the shuffled, endless training stream (Grain) and the validation pass."""

import itertools
import sys
from collections.abc import Iterator

import grain
import numpy as np

from hybridnorm_jax.data.rows.order import Order
from hybridnorm_jax.data.rows.rows import Rows
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.mesh.batch_shares import WHOLE_BATCH, BatchShare

Batch = dict[str, np.ndarray]


def train_iterator(
    order: Order,
    *,
    batch_size: int,
    accumulation: int = 1,
    share: BatchShare = WHOLE_BATCH,
    read_threads: int,
) -> grain.DatasetIterator:
    """Endless batches of this process, arrays (accumulation, local microbatch, seq_len).

    Step s takes rows s B to s B + B - 1 of the order, B = `batch_size`. Microbatch a is the step's a-th stretch of
    B / accumulation rows, of which this process reads only its share.

    `get_state()` is {"next_index": steps taken}; `set_state` with it continues bit for bit, on any number of
    processes and read threads.

    Args:
      order: which rows there are, one after the other.
      batch_size: sequences of a step, over all processes and microbatches.
      accumulation: microbatches of a step.
      share: the stretch of every microbatch that this process reads.
      read_threads: how many threads read ahead.

    Raises:
      DataError: a microbatch that the processes cannot share equally.
    """
    microbatch = batch_size // accumulation
    local = _rows_of_share("train.batch_size", batch_size, rows=microbatch, count=share.count)
    wanted = np.arange(batch_size).reshape(accumulation, share.count, local)[:, share.number].ravel().tolist()

    def read_step(step: int) -> Batch:
        places = order.places(step * batch_size, (step + 1) * batch_size, wanted)
        batch = _stack([place.rows.drawn(place.index, seed=place.seed, epoch=place.epoch) for place in places])
        return {name: values.reshape(accumulation, local, -1) for name, values in batch.items()}

    steps = grain.MapDataset.range(sys.maxsize // batch_size).map(read_step)
    ahead = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    return iter(steps.to_iter_dataset(ahead))


def validation_batches(
    windows: Rows,
    *,
    batch_size: int,
    batches: int | None = None,
    share: BatchShare = WHOLE_BATCH,
) -> Iterator[Batch]:
    """All rows once, in order (at most `batches` batches), arrays (local batch, seq_len) of this process.

    The last batch is filled up with rows of zeros, which have weight 0: every process gets the same number of
    batches.

    Raises:
      DataError: a batch that the processes cannot share equally.
    """
    local = _rows_of_share("eval.batch_size", batch_size, rows=batch_size, count=share.count)

    def read(first: int) -> Batch:
        rows = [windows[index] for index in range(first, min(first + local, len(windows)))]
        blank = {name: np.zeros_like(values) for name, values in windows[0].items()}
        missing = local - len(rows)
        return _stack(rows + [blank] * missing)

    own_first = share.number * local
    starts = range(own_first, own_first + len(windows), batch_size)
    return (read(first) for first in itertools.islice(starts, batches))


def _rows_of_share(key: str, value: int, *, rows: int, count: int) -> int:
    """Rows of one of `count` equal shares; `key` and `value` are for the message."""
    if rows % count:
        raise DataError(f"{key}={value}: {rows} sequences at a time cannot be shared by {count} processes")
    return rows // count


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
