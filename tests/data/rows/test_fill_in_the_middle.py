"""Documents with their middle last: what they are made of, when, and that nothing of them is lost."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data, train_iterator
from hybridnorm_jax.data.rows.fill_in_the_middle import FillInTheMiddle
from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.data.rows.packed_rows import PackedRows, Packing
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.batch_shares import BatchShare

END, PRE, SUF, MID = 90, 91, 92, 93
FIM = FillInTheMiddle(rate=0.5, spm_rate=0.5, prefix_id=PRE, suffix_id=SUF, middle_id=MID, separator_id=END)


def original(tokens):
    """(the kind, the document that was rearranged)."""
    tokens = list(tokens)
    if PRE not in tokens:
        return "plain", tokens
    assert tokens[0] == PRE
    end = tokens[-1:] if tokens[-1] == END else []
    body = tokens[1 : len(tokens) - len(end)]
    middle_at = body.index(MID)
    if body[0] == SUF:
        return "spm", body[middle_at + 1 :] + body[1:middle_at] + end
    suffix_at = body.index(SUF)
    return "psm", body[:suffix_at] + body[middle_at + 1 :] + body[suffix_at + 1 : middle_at] + end


def test_every_document_can_be_put_together_again():
    kinds = collections.Counter()
    document = np.array([*range(20), END])
    for start in range(4000):
        found = FIM.rearranged(document, seed=1, epoch=0, start=start)
        kind, tokens = original(found)
        kinds[kind] += 1
        assert tokens == document.tolist()
        assert len(found) == len(document) + 3 * (kind != "plain")
    # An empty prefix (1 - (20 / 21)^2 = 0.093 of all) looks as if by SPM. Four standard deviations are 0.032 at most.
    for kind, share in (("plain", 0.5), ("psm", 0.25 * 0.907), ("spm", 0.25 * 1.093)):
        assert abs(kinds[kind] / 4000 - share) < 0.032


def test_by_spm_prefix_and_middle_follow_each_other():
    spm = dataclasses.replace(FIM, rate=1.0, spm_rate=1.0)
    for start in range(50):
        found = spm.rearranged(np.array([*range(20), END]), seed=1, epoch=0, start=start).tolist()
        assert found[:2] == [PRE, SUF]
        assert found[-1] == END
        suffix, rest = found[2 : found.index(MID)], found[found.index(MID) + 1 : -1]
        assert rest + suffix == list(range(20))


def test_cuts_are_drawn_evenly():
    psm = dataclasses.replace(FIM, rate=1.0, spm_rate=0.0)
    lengths = collections.Counter()
    for start in range(3000):
        found = psm.rearranged(np.arange(2), seed=0, epoch=0, start=start).tolist()
        lengths[found.index(SUF) - 1, found.index(MID) - found.index(SUF) - 1] += 1
    # Two places of 0, 1 and 2 in any order: nine pairs. Four standard deviations of 2/9 are 0.031.
    for pair, count in {(0, 2): 1, (0, 1): 2, (0, 0): 2, (1, 1): 1, (1, 0): 2, (2, 0): 1}.items():
        assert abs(lengths[pair] / 3000 - count / 9) < 0.031


def test_a_piece_without_a_separator_and_an_empty_document():
    always = dataclasses.replace(FIM, rate=1.0, spm_rate=0.0)
    kind, tokens = original(always.rearranged(np.array([1, 2, 3]), seed=0, epoch=0, start=5))
    assert (kind, tokens) == ("psm", [1, 2, 3])
    assert always.rearranged(np.array([END]), seed=0, epoch=0, start=5).tolist() == [PRE, SUF, MID, END]


def rows_of(fim=FIM, **keys):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 60)
    tokens = np.concatenate([np.append(rng.integers(0, 80, length), END) for length in lengths]).astype(np.uint16)
    stream = TokenStream((Extent(tokens, "tokens", 0, len(tokens)),), 100)
    options = {"seq_len": 24, "one_in_a_row": False, "separator_id": END, "segment_ids": True, "cache_dir": "/nowhere"}
    return PackedRows(stream, Packing(**(options | keys), fim=fim))


def documents(row):
    """The documents of a row, with their last targets."""
    found = []
    for number in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == number
        assert row["positions"][here].tolist() == list(range(here.sum()))
        assert (row["weights"][here] == 1).all()
        found.append([*row["tokens"][here].tolist(), int(row["targets"][here][-1])])
    return found


def test_rows_have_room_and_lose_nothing():
    rows = rows_of()
    plain = collections.Counter(tuple(each) for row in rows for each in documents(row))
    kinds = collections.Counter()
    for epoch in range(3):
        found = collections.Counter()
        for index in range(len(rows)):
            for each in documents(rows.drawn(index, seed=4, epoch=epoch)):
                kind, tokens = original(each)
                kinds[kind] += 1
                found[tuple(tokens)] += 1
        assert found == plain
    assert all(kinds[kind] for kind in ("plain", "psm", "spm"))


def test_without_rearranging_rows_are_those_of_always():
    rows = rows_of(fim=None)
    assert all((rows.drawn(0, seed=1, epoch=2)[name] == rows[0][name]).all() for name in rows[0])


def test_training_rearranges_by_seed_epoch_and_document_alone():
    rows = rows_of()

    def take(count, **keys):
        order = EpochOrder(rows, keys.pop("seed", 5), rounds=16)
        batches = train_iterator(order, **{"batch_size": 4, "read_threads": 2, **keys})
        return [next(batches)["tokens"] for _ in range(count)]

    steps = 3 * len(rows) // 4
    first = np.concatenate(take(steps), axis=1)
    np.testing.assert_array_equal(first, np.concatenate(take(steps, read_threads=1, accumulation=1), axis=1))
    shares = [np.concatenate(take(steps, share=BatchShare(part, 2)), axis=1).reshape(steps, 2, -1) for part in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1).reshape(first.shape), first)
    resumed = train_iterator(EpochOrder(rows, 5, rounds=16), batch_size=4, read_threads=2)
    resumed.set_state({"next_index": steps - 1})
    np.testing.assert_array_equal(next(resumed)["tokens"], first[:, -4:])
    # Another seed, and another epoch, rearrange other documents.
    once, later, other = (
        np.stack([rows.drawn(index, **draw)["tokens"] for index in range(len(rows))])
        for draw in ({"seed": 5, "epoch": 0}, {"seed": 5, "epoch": 1}, {"seed": 6, "epoch": 0})
    )
    assert (once != later).any(axis=1).mean() > 0.1
    assert (once != other).any(axis=1).mean() > 0.1


@pytest.fixture
def section(tmp_path):
    """Makes a DataSection over twenty documents."""
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"Text {number}."}) for number in range(20)))
    base = {"source": "text", "files": (str(tmp_path / "t.jsonl"),), "cache_dir": str(tmp_path / "cache")}
    base |= {"packing": "documents", "fim_rate": 1.0, "fim_tokens": ("257", "258", "259"), "validation_fraction": 0.3}
    return lambda **keys: DataSection(**(base | keys))


def opened(section, vocab_size=260, seq_len=64):
    return open_data(section, seq_len=seq_len, vocab_size=vocab_size, progress=False)


def test_only_training_is_rearranged(section):
    data = opened(section())
    assert (data.train.drawn(0, seed=0, epoch=0)["tokens"] == 257).any()
    held_out = data.validation["validation"]
    assert not any((held_out[index]["tokens"] > 256).any() for index in range(len(held_out)))


def test_tokens_have_names_where_there_is_a_tokenizer(section, tmp_path):
    vocabulary = {chr(number): number for number in range(128)} | {"<PRE>": 128, "<SUF>": 129, "<MID>": 130}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer": str(tmp_path / "tokenizer.json"), "fim_tokens": ("<PRE>", "<SUF>", "<MID>")}
    assert (opened(section(**named)).train.drawn(0, seed=0, epoch=0)["tokens"] == 128).any()
    with pytest.raises(DataError, match=r"^data\.fim_tokens: <PRO>: \S+ has no such token; name one that it has"):
        opened(section(**named | {"fim_tokens": ("<PRO>", "<SUF>", "<MID>")}))


def test_tokens_that_there_are_not(section):
    with pytest.raises(DataError, match=r"^data\.fim_tokens: 259: its id 259 is outside model\.vocab_size=259"):
        opened(section(), vocab_size=259)
    with pytest.raises(DataError, match=r"^data\.fim_tokens: <PRE>: bytes has no such token; .* or give ids"):
        opened(section(fim_tokens=("<PRE>", "258", "259")))
    for first, taken in (("256", "the separator that ends a document"), ("97", "a byte of the text")):
        with pytest.raises(DataError, match=rf"^data\.fim_tokens: {first}: its id {first} is {taken}; give tokens"):
            opened(section(fim_tokens=(first, "258", "259")))
    with pytest.raises(DataError, match=r"^data\.fim_tokens: 0258: its id 258 is the token 258 too; give tokens"):
        opened(section(fim_tokens=("257", "258", "0258")))
    with pytest.raises(DataError, match=r"^train\.seq_len=3: data\.fim_rate needs more than 3"):
        opened(section(), seq_len=3)


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"packing": "windows"}, r"data\.fim_rate=1\.0: needs data\.packing=documents or padded"),
        ({"fim_tokens": ("1", "2")}, r"data\.fim_tokens=\[1, 2\]: must be three"),
        ({"fim_tokens": ("1", "2", "2")}, r"data\.fim_tokens=.*: must be three"),
        ({"fim_rate": 0.0}, r"data\.fim_tokens=.*: needs data\.fim_rate"),
        ({"fim_rate": 1.5}, r"data\.fim_rate=1\.5: must be at least 0 and at most 1"),
        ({"records": "prompt"}, r"data\.fim_rate=1\.0: not with data\.records=prompt"),
    ],
)
def test_keys_that_do_not_fit(section, keys, wrong):
    with pytest.raises(ConfigError, match=f"^{wrong}"):
        section(**keys)
