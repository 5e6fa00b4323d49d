"""The order of training batches, their resumption, and the validation pass."""

import collections
import itertools
import json

import grain
import numpy as np
import pytest

from hybridnorm_jax.data import DataError, Windows, train_iterator, validation_batches
from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.mesh.batch_shares import BatchShare

SEQ_LEN = 4


class RecordingWindows(Windows):
    """Windows that remember which of them were read."""

    def __init__(self, num_rows, tail=False):
        tokens = np.arange(num_rows * SEQ_LEN + 1, dtype=np.uint16)
        stream = TokenStream((Extent(tokens, "tokens", 0, len(tokens)),), len(tokens))
        super().__init__(stream, seq_len=SEQ_LEN, tail=tail)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def iterator(windows, **keys):
    order = EpochOrder(windows, keys.pop("seed", 0), rounds=16)
    return train_iterator(order, **{"batch_size": 6, "read_threads": 2, **keys})


def numbers(batch):
    """Which windows a batch is made of, in its shape."""
    assert (batch["targets"] == batch["tokens"] + 1).all()
    return batch["tokens"][..., 0] // SEQ_LEN


def take(batches, count):
    return [numbers(batch) for batch in itertools.islice(batches, count)]


def flat(batches):
    return np.concatenate([batch.ravel() for batch in batches]).tolist()


def test_shapes_and_endlessness():
    batches = iterator(RecordingWindows(5), accumulation=3)
    for _ in range(7):
        batch = next(batches)
        assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(batch, (3, 2, SEQ_LEN))


def test_every_epoch_has_each_window_once_in_another_order():
    rows = 35
    order = flat(take(iterator(RecordingWindows(rows)), 35))  # 6 epochs in batches of 6
    epochs = [order[start : start + rows] for start in range(0, 6 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert list(range(rows)) not in epochs


def test_the_order_follows_from_the_seed_alone():
    first, again = (flat(take(iterator(RecordingWindows(40)), 12)) for _ in range(2))
    assert first == again
    assert first == flat(take(iterator(RecordingWindows(40), read_threads=5), 12))
    assert first == flat(take(iterator(RecordingWindows(40), accumulation=3), 12))
    assert first == flat(take(iterator(RecordingWindows(40), batch_size=8), 9))
    assert first[:40] != flat(take(iterator(RecordingWindows(40), seed=1), 12))[:40]


@pytest.mark.parametrize("rows", [1, 2, 37, 5000])
def test_the_order_of_four_rounds_is_that_of_grains_shuffle(rows):
    """As versions before had it, so that their runs go on with the rows that they would have read."""
    seed = int(np.random.SeedSequence(7).generate_state(1)[0])
    grains = grain.MapDataset.range(rows).shuffle(seed=seed).repeat()
    order = EpochOrder(RecordingWindows(rows), seed=7, rounds=4)
    for row in (*range(2 * min(rows, 100) + 3), 10**6, 10**12 + 1):
        assert order.place(row).index == grains[row]


def test_neighbouring_seeds_share_no_epoch():
    epochs = [flat(take(iterator(RecordingWindows(30), seed=seed), 10)) for seed in range(3)]
    halves = [tuple(order[start : start + 30]) for order in epochs for start in (0, 30)]
    assert len(set(halves)) == 6


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_together_read_what_one_would(process_count):
    keys = {"batch_size": 12, "accumulation": 2}
    alone = take(iterator(RecordingWindows(31), **keys), 6)
    shares = [
        take(iterator(RecordingWindows(31), share=BatchShare(index, process_count), **keys), 6)
        for index in range(process_count)
    ]
    for step, whole in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares], axis=1), whole)


def test_a_process_reads_only_its_own_windows():
    windows = RecordingWindows(36)
    mine = iterator(windows, share=BatchShare(1, 3), read_threads=1)
    seen = flat(take(mine, 2))
    mine.close()
    ahead = 2  # steps that one thread may have begun before it was stopped
    assert windows.read[: len(seen)] == seen
    assert len(windows.read) <= len(seen) + 2 * (ahead + 1)


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 7, 23])
def test_a_restored_iterator_continues_exactly(steps):
    uninterrupted = iterator(RecordingWindows(31), accumulation=2)
    for _ in range(steps):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    assert len(json.dumps(state)) < 100
    expected = [next(uninterrupted) for _ in range(8)]
    restored = iterator(RecordingWindows(31), accumulation=2, read_threads=3)
    next(restored)  # its threads have read ahead already
    restored.set_state(state)
    for batch in expected:
        again = next(restored)
        for name, values in batch.items():
            np.testing.assert_array_equal(again[name], values)


def test_a_state_is_good_on_any_number_of_processes():
    alone = iterator(RecordingWindows(31))
    take(alone, 7)
    state = alone.get_state()
    expected = take(alone, 3)
    pair = [iterator(RecordingWindows(31), share=BatchShare(index, 2)) for index in range(2)]
    for share in pair:
        share.set_state(state)
        assert share.get_state() == state
    together = [np.concatenate(both, axis=1) for both in zip(*(take(share, 3) for share in pair), strict=True)]
    np.testing.assert_array_equal(together, expected)


def test_an_error_in_a_reading_thread_reaches_the_caller():
    tokens = np.arange(41, dtype=np.uint16)
    windows = Windows(TokenStream((Extent(tokens, "a.bin", 0, 41),), 40), seq_len=SEQ_LEN, tail=False)
    batches = iterator(windows, batch_size=10)
    with pytest.raises(DataError, match=r"^a\.bin: token 40 is 40") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_one_window_is_enough():
    assert flat(take(iterator(RecordingWindows(1)), 2)) == [0] * 12


def test_processes_must_share_a_microbatch_equally():
    with pytest.raises(DataError, match=r"train\.batch_size=6: 2 sequences .* 4 processes"):
        iterator(RecordingWindows(9), accumulation=3, share=BatchShare(0, 4))
    with pytest.raises(DataError, match=r"eval\.batch_size=6: "):
        validation_batches(RecordingWindows(9), batch_size=6, share=BatchShare(0, 4))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_validation_reads_every_window_once_in_order(process_count):
    shares = [
        list(validation_batches(RecordingWindows(10), batch_size=4, share=BatchShare(index, process_count)))
        for index in range(process_count)
    ]
    assert {len(share) for share in shares} == {3}
    whole = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert {batch["tokens"].shape for batch in whole} == {(4, SEQ_LEN)}
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in whole])
    assert targets.tolist() == list(range(1, 41))


def test_validation_fills_the_last_batch_with_rows_of_no_weight():
    *_, last = validation_batches(RecordingWindows(5), batch_size=4)
    assert last["weights"].sum(axis=1).tolist() == [SEQ_LEN, 0, 0, 0]


def test_validation_can_be_cut_short():
    windows = RecordingWindows(100)
    assert flat(take(validation_batches(windows, batch_size=4, batches=2), 9)) == list(range(8))
    assert len(list(validation_batches(RecordingWindows(5), batch_size=4, batches=50))) == 2
    assert max(collections.Counter(windows.read)) == 7
