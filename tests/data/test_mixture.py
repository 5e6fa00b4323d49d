"""Mixtures: what is read of each source and in which order, what is said of it, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.data import open_data, train_iterator
from hybridnorm_jax.data.mixture import Mixture, mixture_of, order_of
from hybridnorm_jax.errors import ConfigError, DataError
from hybridnorm_jax.mesh.batch_shares import BatchShare

SEQ_LEN = 8
# Ids say which source a token is of: source i has i * 1000 + place in steps of one row.
ROWS = {"books": 40, "code": 25, "web": 60}


@pytest.fixture
def mixed(tmp_path):
    """Makes the configuration of a run on three token files whose ids say where they stand."""
    for number, (name, rows) in enumerate(ROWS.items()):
        ids = number * 1000 + np.arange(rows * SEQ_LEN + 1) // SEQ_LEN
        np.save(tmp_path / f"{name}.npy", ids.astype(np.uint16))

    def config(*overrides, weights=(5, 2, 3)):
        mixture = [
            f"data.mixture.{name}={{files: [{tmp_path}/{name}.npy], weight: {weight}}}"
            for name, weight in zip(ROWS, weights, strict=True)
        ]
        sizes = [f"train.seq_len={SEQ_LEN}", "train.batch_size=12", "train.steps=100", "model.vocab_size=4000"]
        return parse([*mixture, *sizes, "data.validation_fraction=0", f"data.cache_dir={tmp_path}/cache", *overrides])

    return config


def opened(config):
    return open_data(config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size, progress=False)


def iterator(config, **keys):
    options = {"batch_size": config.train.batch_size, "accumulation": config.train.grad_accumulation}
    return train_iterator(order_of(config, opened(config)), **options, read_threads=2, **keys)


def read(config, steps, **keys):
    """The first id of each row, which names source and row, of each step."""
    batches = itertools.islice(iterator(config, **keys), steps)
    return [batch["tokens"][..., 0] for batch in batches]


def counts(steps):
    sources = np.concatenate([step.ravel() for step in steps]) // 1000
    return dict(zip(ROWS, np.bincount(sources, minlength=3).tolist(), strict=True))


STAGES = "data.stages=[{at: 0.4, weights: {books: 1, web: 3}}, {at: 80, weights: {code: 1}}]"


def test_each_stage_has_its_shares(mixed):
    steps = read(mixed(STAGES), 100)
    parts = [counts(part) for part in (steps[:40], steps[40:80], steps[80:])]
    assert parts == [
        {"books": 240, "code": 96, "web": 144},
        {"books": 120, "code": 0, "web": 360},
        {"books": 0, "code": 240, "web": 0},
    ]


def test_each_source_has_epochs_in_which_every_row_comes_once(mixed):
    rows = np.concatenate([step.ravel() for step in read(mixed(STAGES), 100)])
    for number, (name, size) in enumerate(ROWS.items()):
        own = rows[rows // 1000 == number] % 1000
        # A batch permutes its rows, so an epoch's last ones may come after the next one's first: count them.
        assert np.bincount(own, minlength=size).max() - np.bincount(own, minlength=size).min() <= 1, name
        assert own[:size].tolist() != list(range(size))


def test_a_later_stage_goes_on_where_the_source_was(mixed):
    """Until its first epoch is over, a source gives no row twice, however many stages there are."""
    stages = "data.stages=[{at: 3, weights: {web: 1}}, {at: 5, weights: {books: 1, web: 1}}]"
    rows = np.concatenate([step.ravel() for step in read(mixed(stages), 6)])
    web = rows[rows // 1000 == 2]
    assert len(web) == 11 + 24 + 6  # of 36 rows 3 in 10, all of 24, half of 12
    assert len(set(web.tolist())) == len(web)


@pytest.mark.parametrize("process_count", [2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_microbatches_and_threads_change_no_row(mixed, process_count, accumulation):
    alone = read(mixed(STAGES), 50)
    config = mixed(STAGES, f"train.grad_accumulation={accumulation}", f"data.read_threads={process_count}")
    if 12 // accumulation % process_count:
        pytest.skip("a microbatch that they cannot share")
    shares = [read(config, 50, share=BatchShare(number, process_count)) for number in range(process_count)]
    for step, whole in enumerate(alone):
        together = np.concatenate([share[step] for share in shares], axis=1)
        np.testing.assert_array_equal(together.ravel(), whole.ravel())


@pytest.mark.parametrize("steps", [0, 1, 39, 40, 41, 79, 85])
def test_a_restored_iterator_goes_on_exactly(mixed, steps):
    config = mixed(STAGES)
    uninterrupted = iterator(config)
    for _ in range(steps):
        next(uninterrupted)
    state = uninterrupted.get_state()
    assert state == {"next_index": steps}
    restored = iterator(config)
    restored.set_state(state)
    for _ in range(6):
        one, other = next(uninterrupted), next(restored)
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_another_batch_size_reads_the_same_rows(mixed):
    small = read(mixed("train.batch_size=4", "train.steps=300", "data.stages=[{at: 0.5, weights: {web: 1}}]"), 240)
    large = read(mixed("data.stages=[{at: 0.5, weights: {web: 1}}]"), 80)
    both = [np.concatenate([step.ravel() for step in steps]) for steps in (small, large)]
    assert sorted(both[0].tolist()) == sorted(both[1].tolist())


def test_the_order_of_the_sources_in_a_file_does_not_matter(mixed):
    config = mixed(STAGES)
    turned = dataclasses.replace(config.data, mixture=dict(reversed(config.data.mixture.items())))
    other = dataclasses.replace(config, data=turned)
    assert config == other
    np.testing.assert_array_equal(read(config, 50), read(other, 50))


def test_the_seed_of_the_data_decides(mixed):
    one, other = (np.concatenate(read(mixed("train.seed=1", f"train.data_seed={seed}"), 20)) for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(one, np.concatenate(read(mixed("train.seed=2", "train.data_seed=0"), 20)))


def test_what_is_read_until_a_step_is_what_was_counted(mixed):
    config = mixed(STAGES)
    mixture, steps = mixture_of(config, opened(config)), read(config, 100)
    for step in (0, 1, 17, 40, 63, 80, 100):
        found = {name: tokens // SEQ_LEN for name, tokens in mixture.tokens_until(step).items()}
        assert found == (counts(steps[:step]) if step else dict.fromkeys(ROWS, 0))
    epochs = {name: amount.epochs for name, amount in mixture.read_until(100).items()}
    assert epochs == {"books": 360 / 40, "code": 336 / 25, "web": 504 / 60}
    shares = [stage.shares for stage in mixture.stage_shares()]
    assert shares[1] == {"books": 0.25, "code": 0.0, "web": 0.75}
    assert [(stage.first, stage.last) for stage in mixture.stage_shares()] == [(1, 40), (41, 80), (81, 100)]


def test_realized_shares_are_within_a_thousandth(mixed):
    """Of weights that nothing divides, over each stage of 2,400 rows."""
    weights = {"books": 0.6180339, "code": 0.2718281, "web": 0.1100380}
    stages = "data.stages=[{at: 200, weights: {books: 0.1, code: 0.57721, web: 0.32279}}]"
    config = mixed(stages, "train.steps=400", weights=tuple(weights.values()))
    steps = read(config, 400)
    for part, asked in ((steps[:200], weights), (steps[200:], {"books": 0.1, "code": 0.57721, "web": 0.32279})):
        for name, count in counts(part).items():
            assert abs(count / 2400 - asked[name] / sum(asked.values())) < 1e-3


def test_a_source_that_runs_out_is_refused_with_what_would_be_right(mixed):
    config = mixed("data.mixture.code.epochs=4")
    with pytest.raises(DataError) as caught:
        mixture_of(config, opened(config)).check_epochs()
    # 1,200 rows, of which 2 in 10 are code: 240 of 25 are 9.6 epochs. 4 epochs are 100 rows, a twelfth of the run.
    assert str(caught.value) == (
        "data.mixture.code.epochs=4: at the end of training, step 100, the source is read 9.60 times; lower its "
        "weights (it has 20.00% of the run and may have 8.33%), make at most 41 steps (train.steps), or give it more "
        "files"
    )
    never = mixed("data.mixture.code.epochs=0.001")
    with pytest.raises(DataError, match=r"may have 0\.00%\), or give it more files$"):  # no steps are no advice
        mixture_of(never, opened(never)).check_epochs()
    within = mixed("data.mixture.code.epochs=4", "train.steps=41")
    mixture_of(within, opened(within)).check_epochs()
    beyond = mixed("data.mixture.code.epochs=4", "train.steps=42")
    with pytest.raises(DataError):
        mixture_of(beyond, opened(beyond)).check_epochs()


@pytest.fixture
def texts(tmp_path):
    """Makes a run on short and on long documents, 100 and 20 of them."""
    (tmp_path / "short.jsonl").write_text("\n".join(f'{{"text": "{number:09}"}}' for number in range(100)))
    (tmp_path / "long.jsonl").write_text("\n".join(f'{{"body": "{number:089}"}}' for number in range(20)))

    def config(*overrides):
        files = [f"data.mixture.short.files=[{tmp_path}/short.jsonl]", f"data.mixture.long.files=[{tmp_path}/long.*]"]
        keys = ["data.mixture.long.text_field=body", "data.mixture.long.source=text", "train.seq_len=8"]
        return parse([*files, *keys, "train.batch_size=10", f"data.cache_dir={tmp_path}/cache", *overrides])

    return config


def test_weights_may_count_documents(texts):
    """A short document is 10 tokens, a long one 90: of as many documents, nine tenths of the tokens are long."""
    config = texts("data.mixture_unit=documents", "data.validation_fraction=0")
    data = opened(config)
    assert {name: source.documents for name, source in data.sources.items()} == {"short": 100, "long": 20}
    (stage,) = Mixture(config, data.sources).stage_shares()
    assert stage.shares == {"short": 0.1, "long": 0.9}
    (stage,) = Mixture(texts("data.validation_fraction=0"), data.sources).stage_shares()
    assert stage.shares == {"short": 0.5, "long": 0.5}


def test_token_files_do_not_know_their_documents(mixed):
    config = mixed("data.mixture_unit=documents")
    with pytest.raises(DataError, match=r"^data\.mixture_unit=documents: the token files of data\.mixture\.books do"):
        mixture_of(config, opened(config))


def test_each_source_has_its_own_validation_set(texts, tmp_path):
    (tmp_path / "other.txt").write_text("something else to read")
    data = opened(texts("data.validation_fraction=0.2", f"data.validation.other=[{tmp_path}/other.txt]"))
    assert list(data.validation) == ["short", "long", "other"]
    tokens = {name: source.train.num_tokens + data.validation[name].num_tokens for name, source in data.sources.items()}
    assert tokens == {"short": 1000, "long": 1800}
    digits = data.tokenizer.decode(data.validation["short"][0]["tokens"])
    assert digits.startswith("0000000")


def test_text_and_token_files_are_mixed(tmp_path):
    np.save(tmp_path / "ids.npy", np.full(500, 7, np.uint16))
    (tmp_path / "text.txt").write_text("a" * 500)
    arguments = [
        f"data.mixture.ids.files=[{tmp_path}/ids.npy]",
        f"data.mixture.text.files=[{tmp_path}/text.txt]",
        f"data.cache_dir={tmp_path}/cache",
        "train.seq_len=16",
        "train.batch_size=8",
        "data.validation_fraction=0",
    ]
    config = parse(arguments)
    batch = next(iterator(config))
    assert sorted(np.unique(batch["tokens"]).tolist()) == [7, ord("a")]
    assert (batch["tokens"] == 7).sum() == 64
    with pytest.raises(DataError, match=r"^data\.mixture\.ids: data\.separator_id=null: "):
        opened(parse([*arguments, "data.segment_ids=true"]))
    with pytest.raises(DataError, match=r"^data\.separator_id=0: the documents of the mixture's text end with id 256"):
        opened(parse([*arguments, "data.separator_id=0"]))
    rows = next(iterator(parse([*arguments, "data.segment_ids=true", "data.separator_id=256"])))
    assert {"segment_ids", "positions"} <= set(rows)


def error_of(config):
    with pytest.raises((ConfigError, DataError)) as caught:
        opened(config())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_sources_may_not_read_the_same_file(mixed, tmp_path):
    (tmp_path / "link.npy").symlink_to(tmp_path / "web.npy")
    line = error_of(lambda: mixed(f"data.mixture.more.files=[{tmp_path}/link.npy]"))
    assert line.startswith("data.mixture.more.files: ")
    assert "link.npy is read by data.mixture.web too" in line
    np.save(tmp_path / "large.npy", np.arange(4000, dtype=np.int64))
    np.save(tmp_path / "copy.npy", np.arange(4000, dtype=np.int64))
    files = [f"data.mixture.x.files=[{tmp_path}/large.npy]", f"data.mixture.y.files=[{tmp_path}/copy.npy]"]
    line = error_of(lambda: mixed(*files))
    assert line.startswith("data.mixture.y.files: copy.npy is read by data.mixture.x too")
    line = error_of(lambda: parse(["data.mixture.a.source=stdlib", "data.mixture.b.source=stdlib"]))
    assert "the standard library is read by data.mixture.a too" in line


def test_an_empty_or_short_source_is_named(mixed, tmp_path):
    np.save(tmp_path / "code.npy", np.zeros(0, np.uint16))
    assert error_of(mixed) == f"data.mixture.code: {tmp_path}/code.npy: holds no tokens"
    np.save(tmp_path / "code.npy", np.zeros(8, np.uint16))
    says = "data.mixture.code: train.seq_len=8: a window needs 9 tokens, but there are 8 to train on; lower"
    assert error_of(mixed).startswith(says)


def test_a_missing_file_of_a_source_is_named_before_anything_is_tokenized(texts, tmp_path):
    line = error_of(lambda: texts(f"data.mixture.none.files=[{tmp_path}/none.txt]"))
    assert line == f"data.mixture.none.files: no such file: {tmp_path}/none.txt"
    assert not (tmp_path / "cache").exists()


def test_a_source_of_which_nothing_can_be_held_out_is_named(texts, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "the only document of this source"}')
    line = error_of(lambda: texts(f"data.mixture.short.files=[{tmp_path}/one.jsonl]"))
    assert line.startswith("data.mixture.short: data.validation_fraction=0.02: there is one document")


def test_without_a_mixture_nothing_changes(tmp_path):
    """The order of a run on one source, as it was before there were mixtures: seed 0, 10 windows, batches of 4."""
    np.save(tmp_path / "a.npy", (np.arange(41) // 4).astype(np.uint16))
    config = parse(
        [
            "data.source=tokens",
            f"data.files=[{tmp_path}/a.npy]",
            "data.validation_fraction=0",
            "train.seq_len=4",
            "train.batch_size=4",
            "train.shuffle_rounds=4",
        ]
    )
    rows = [batch["tokens"][0, :, 0].tolist() for batch in itertools.islice(iterator(config), 3)]
    assert rows == [[5, 8, 9, 7], [4, 2, 1, 0], [3, 6, 6, 9]]
