"""From records of which only a part is learned to the weights of rows: through the cache and through `tokenize`."""

import json

import numpy as np
import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.mixture_section import SourceSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.text.sources import section_corpus
from hybridnorm_jax.data.tokens.token_shards import SplitState, SplitWriter
from hybridnorm_jax.data.tokens.token_workers import ThisProcess
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens
from hybridnorm_jax.errors import ConfigError

RECORDS = [{"prompt": f"Count to {n}: ", "completion": " ".join(map(str, range(n)))} for n in range(1, 41)]
TALKS = [
    {"messages": [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": each["completion"]}]}
    for each in RECORDS
]


@pytest.fixture
def section(tmp_path):
    """Makes a DataSection over records."""

    def make(content=RECORDS, **keys):
        (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, content)))
        base = {"source": "text", "files": (str(tmp_path / "records.jsonl"),), "cache_dir": str(tmp_path / "cache")}
        return DataSection(**(base | {"records": "prompt", "validation_fraction": 0.3} | keys))

    return make


def opened(section, seq_len=64, vocab_size=257):
    return open_data(section, seq_len=seq_len, vocab_size=vocab_size, progress=False)


def learned(data):
    """What is learned of each document, as text with | for its end, of training and of what is held out."""
    found = []
    for rows in (data.train, *data.validation.values()):
        for row in rows:
            for number in range(1, row["segment_ids"].max() + 1):
                here = (row["segment_ids"] == number) & (row["weights"] > 0)
                found.append(bytes(124 if token == 256 else token for token in row["targets"][here]).decode())
    return sorted(found)


def test_completions_and_their_ends_have_weight(section):
    data = opened(section(packing="documents"), seq_len=128)
    assert learned(data) == sorted(f"{each['completion']}|" for each in RECORDS)
    assert data.train.bytes_per_token is None


def test_of_conversations_what_the_assistant_says_has_weight(section):
    data = opened(section(TALKS, records="messages", packing="padded", segment_ids=True), seq_len=256)
    assert learned(data) == sorted(f"{each['completion']}<|im_end|>" for each in RECORDS)


def test_windows_have_the_same_weights(section):
    """All targets but those of the tail that training drops."""
    windows = opened(section(validation_fraction=0.0), seq_len=8).train
    expected = "".join(f"{each['completion']}|" for each in RECORDS)
    found = [token for row in windows for token in row["targets"][row["weights"] > 0]]
    text = bytes(124 if token == 256 else token for token in found).decode()
    assert expected.startswith(text)
    assert len(expected) - len(text) < 8


def test_a_directory_of_tokens_keeps_what_is_learned(section, tmp_path):
    directory = tmp_path / "tokens"
    directory.mkdir()
    of_text = section(packing="documents")
    job = Job(section_corpus(of_text, "FILE"), ByteTokenizer(), 0.3, shard_tokens=300)
    manifest = write_tokens(directory, job, ThisProcess(ByteTokenizer()), shown=False)
    assert len(manifest.shards["train"]) > 2
    data = opened(
        DataSection(source="tokens", files=(str(directory),), packing="documents", validation_fraction=0.3), seq_len=128
    )
    expected = learned(opened(of_text, seq_len=128))
    assert learned(data) == expected
    assert data.train.bytes_per_token is None
    # Also where its shards are named one by one, and the manifest is not read.
    shards = {split: (f"{directory}/{split}-*.npy",) for split in manifest.shards}
    section = DataSection(
        source="tokens",
        files=shards["train"],
        packing="documents",
        validation_fraction=0.0,
        validation={"held_out": shards["validation"]},
        tokenizer="bytes",
    )
    data = opened(section, seq_len=128)
    assert learned(data) == expected
    assert data.train.bytes_per_token is None


@pytest.mark.parametrize(
    "mask", [np.ones(99, "u1"), np.ones(101, "u1"), np.ones(100, "<u2"), np.ones((100, 1), "u1"), None]
)
def test_what_does_not_say_which_tokens_are_learned_is_refused(tmp_path, mask):
    np.save(tmp_path / "a.npy", np.arange(100, dtype="<u2"))
    if mask is None:
        (tmp_path / "a.targets.npy").write_bytes(b"")
    else:
        np.save(tmp_path / "a.targets.npy", mask)
    with pytest.raises(DataError, match=r"^\S*a\.targets\.npy: [^\n]*$"):
        opened(DataSection(source="tokens", files=(str(tmp_path / "a.npy"),), validation_fraction=0.0))


def test_tokens_of_which_only_a_part_is_learned_are_not_rearranged(tmp_path):
    """Their mask would be of the tokens in another order; it is said before a row is read."""
    for name in ("a.npy", "a.targets.npy"):
        np.save(tmp_path / name, np.ones(100, "u1"))
    section = DataSection(
        source="tokens",
        files=(str(tmp_path / "a.npy"),),
        validation_fraction=0.0,
        packing="padded",
        separator_id=0,
        fim_rate=0.5,
        fim_tokens=("257", "258", "259"),
    )
    with pytest.raises(DataError, match=r"^data\.fim_rate=0\.5: not with token files of which only a part is learned"):
        opened(section, vocab_size=260)


def test_a_token_is_learned_or_not_and_nothing_else(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype="<u2"))
    np.save(tmp_path / "a.targets.npy", np.where(np.arange(100) == 70, 2, 1).astype("u1"))
    data = opened(DataSection(source="tokens", files=(str(tmp_path / "a.npy"),), validation_fraction=0.0), seq_len=33)
    assert data.train[0]["weights"].tolist() == [1.0] * 33
    with pytest.raises(DataError, match=r"a\.npy: the \.targets\.npy beside it holds 2 for token 70; it must hold"):
        data.train[2]


def test_a_writer_goes_on_with_what_is_learned(tmp_path):
    def write(directory, state, numbers):
        writer = SplitWriter(directory, "train", dtype=np.dtype("<u2"), shard_tokens=20, state=state, has_targets=True)
        with writer:
            for number in numbers:
                writer.write(np.full(number % 7, number, np.uint16), np.arange(number % 7) % 2)
                writer.end(np.array([99], np.uint16), np.array([number % 2]))
            writer.flush()
        return writer

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", SplitState(), range(30))
    state = write(tmp_path / "stopped", SplitState(), range(11)).state
    kept = SplitState([list(each) for each in state.shards], state.bytes, state.words, state.max_id)
    write(tmp_path / "stopped", state, range(50, 60))  # is lost
    write(tmp_path / "stopped", kept, range(11, 30))
    whole, stopped = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "stopped")
    )
    assert len(whole) > 2
    assert stopped == whole


def test_another_kind_of_records_is_another_cache(section, tmp_path):
    both = [prompt | talk for prompt, talk in zip(RECORDS, TALKS, strict=True)]
    for kind in ("prompt", "messages"):
        opened(section(both, records=kind))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.role + message.content }}{% endfor %}")
    opened(section(both, records="messages", chat_template=str(template)))
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"records": "prompts"}, r"data\.records=prompts: not known; did you mean 'prompt'"),
        ({"chat_template": "x.jinja"}, r"data\.chat_template=x\.jinja: only for data\.records=messages"),
        ({"source": "stdlib", "files": ()}, r"data\.records=prompt: only for data\.source=text"),
    ],
)
def test_keys_that_do_not_fit(section, keys, wrong):
    with pytest.raises(ConfigError, match=f"^{wrong}"):
        section(**keys)


def test_a_text_file_has_no_prompts(section, tmp_path):
    (tmp_path / "a.txt").write_text("no record")
    with pytest.raises(DataError, match=r"a\.txt: a text file has no field 'prompt' \(data\.records\)"):
        opened(section(files=(str(tmp_path / "a.txt"),)))


def test_a_record_that_is_wrong_is_named(section):
    with pytest.raises(DataError, match=r"records\.jsonl:2: has no field 'completion'; it has: prompt"):
        opened(section([RECORDS[0], {"prompt": "x"}]))


def test_a_mixture_has_records_beside_text(tmp_path):
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"text": f"Text {number}."}) for number in range(50)))
    mixture = {
        "talks": SourceSection(files=(str(tmp_path / "talks.jsonl"),), records="messages"),
        "plain": SourceSection(files=(str(tmp_path / "plain.jsonl"),)),
    }
    keys = {"cache_dir": str(tmp_path / "cache"), "packing": "documents"}
    data = opened(DataSection(mixture=mixture, **keys), seq_len=256)
    shares = {
        name: np.mean([row["weights"][row["segment_ids"] > 0].mean() for row in source.train])
        for name, source in data.sources.items()
    }
    assert shares["plain"] == 1
    assert 0 < shares["talks"] < 0.6
    with pytest.raises(ConfigError, match=r"^data\.mixture\.talks\.records=messages: not with data\.fim_rate"):
        DataSection(mixture=mixture, fim_rate=0.5, fim_tokens=("257", "258", "259"), **keys)
    of_tokens = {"a": SourceSection(files=("t.npy",), records="prompt")}
    with pytest.raises(ConfigError, match=r"^data\.mixture\.a\.records=prompt: only for a source of text"):
        DataSection(mixture=of_tokens)
