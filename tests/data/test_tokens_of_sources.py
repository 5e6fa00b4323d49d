"""data/NAME/tokens: what is said of every source after a step is counted in the batches that were delivered."""

import itertools
import json

import numpy as np
import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.data import open_data, train_iterator
from hybridnorm_jax.data.mixture import mixture_of, order_of
from hybridnorm_jax.mesh.batch_shares import BatchShare

STEPS = 30
# The letter of which a source's documents are -> how many documents there are, the longest of them, and the weight.
SOURCES = {"a": (90, 30, 3), "b": (40, 11, 2), "c": (25, 60, 1)}
FIM_IDS = (300, 301, 302)
PACKINGS = {
    "windows": ["data.packing=windows", "data.segment_ids=true"],
    "documents": ["data.packing=documents"],
    "padded": ["data.packing=padded"],
    "fill in the middle": ["data.packing=documents", "data.fim_rate=0.6", f"data.fim_tokens={list(map(str, FIM_IDS))}"],
}


@pytest.fixture
def configuration(tmp_path):
    """Makes the configuration of a run on three sources with documents of random lengths."""
    rng = np.random.default_rng(0)
    words = [f"data.cache_dir={tmp_path}/cache", "data.validation_fraction=0", "model.vocab_size=400"]
    for name, (count, longest, weight) in SOURCES.items():
        texts = [name * int(length) for length in rng.integers(1, longest, count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        words += [f"data.mixture.{name}.files=[{path}]", f"data.mixture.{name}.weight={weight}"]
    sizes = ["train.seq_len=16", "train.batch_size=12", f"train.steps={STEPS}"]
    stages = "data.stages=[{at: 11, weights: {a: 1, c: 2}}, {at: 20, weights: {b: 1}}]"
    return lambda *more: parse([*words, *sizes, stages, *more])


def mixed(config):
    """(its Mixture, the order of its rows), opened anew as a process that starts does it."""
    data = open_data(config.data, seq_len=16, vocab_size=400, progress=False)
    return mixture_of(config, data), order_of(config, data)


def counted(batch):
    """Letter -> positions in a batch that hold a token, without the marks of documents that are rearranged."""
    found = dict.fromkeys(SOURCES, 0)
    for row in batch["tokens"].reshape(-1, 16):
        (name,) = (letter for letter in SOURCES if (row == ord(letter)).any())
        found[name] += int(((row != 0) & ~np.isin(row, FIM_IDS)).sum())
    return found


def delivered(config, *, processes):
    """What the batches of all processes hold of each source until every step, from step 0 on."""
    _, order = mixed(config)
    batches = [
        train_iterator(order, batch_size=12, share=BatchShare(number, processes), read_threads=1)
        for number in range(processes)
    ]
    until = [dict.fromkeys(SOURCES, 0)]
    for parts in itertools.islice(zip(*batches, strict=True), STEPS):
        now = [counted(part) for part in parts]
        until.append({name: until[-1][name] + sum(part[name] for part in now) for name in SOURCES})
    return until


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_step_has_the_tokens_that_were_delivered(configuration, packing):
    """In the middle of epochs, and across the two stages."""
    config = configuration(*PACKINGS[packing])
    mixture, _ = mixed(config)
    expected = delivered(config, processes=1)
    assert [mixture.tokens_until(step) for step in range(STEPS + 1)] == expected
    epochs = [mixture.read_until(step)["a"].epochs for step in (5, 11, STEPS)]
    assert all(number % 1 for number in epochs)
    assert max(amount.epochs for amount in mixture.read_until(STEPS).values()) > 2
    if packing != "windows":  # the mean of rows is another number: nothing was exact before an epoch's end
        mean = [{name: amount.mean_tokens for name, amount in mixture.read_until(step).items()} for step in (5, 17)]
        assert mean != [expected[5], expected[17]]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_run_resumed_on_other_processes_knows_it_at_once(configuration, processes):
    config = configuration(*PACKINGS["padded"])
    expected = delivered(config, processes=processes)
    assert expected == delivered(config, processes=1)
    for step in (5, 17, 29):
        mixture, order = mixed(config)
        parts = []
        for number in range(processes):
            iterator = train_iterator(order, batch_size=12, share=BatchShare(number, processes), read_threads=1)
            iterator.set_state({"next_index": step})
            parts.append(counted(next(iterator)))
        before, after = mixture.tokens_until(step), mixture.tokens_until(step + 1)
        assert after == expected[step + 1]
        assert {name: after[name] - before[name] for name in SOURCES} == {
            name: sum(part[name] for part in parts) for name in SOURCES
        }
