"""What parameters were trained on is no validation of the run that begins with them, nor of an evaluation."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybridnorm_jax.commands.main import main

TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "train.sample_tokens=0"),
    *("train.steps=1", "train.batch_size=8", "train.seq_len=8", "data.source=text", "eval.batches=1"),
]


def byte_tokenizer_json(path, *extra):
    """A tokenizer.json of byte-level characters and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *extra])
    tokenizer.save(str(path))


def _text(seed):
    rng = random.Random(seed)
    return "".join(f"{' '.join(rng.choices('abcdefgh', k=8))}\n" for _ in range(400))


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Trains in an empty directory with a.txt and b.txt; returns the one line of an error, or None."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(_text(name))

    def run(*arguments, command="train"):
        keys = [*TINY, "run.dir=runs", "data.cache_dir=cache"] if command == "train" else []
        status = main([command, *arguments, *keys])
        told = capsys.readouterr().err
        if status == 0:
            return None
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        return line

    return run


def test_a_larger_share_than_was_held_out_is_refused_and_the_same_is_not(train):
    assert train("run.name=all", "data.files=[a.txt]", "data.validation_fraction=0") is None
    line = train("run.name=x", "data.files=[a.txt]", "init_from=runs/all", "data.validation_fraction=0.3")
    assert line.startswith(
        "error: data.validation_fraction: saved 0.0, asked 0.3: init_from=runs/all was trained on parts"
    )
    assert train("run.name=other", "data.files=[b.txt]", "init_from=runs/all", "data.validation_fraction=0.3") is None
    assert train("run.name=most", "data.files=[a.txt]", "data.validation_fraction=0.3") is None
    assert train("run.name=same", "data.files=[a.txt]", "init_from=runs/most", "data.validation_fraction=0.3") is None
    assert train("run.name=less", "data.files=[a.txt]", "init_from=runs/most", "data.validation_fraction=0.2") is None


def test_a_set_of_what_was_trained_on_is_refused_but_for_one_that_says_so(train):
    assert train("run.name=all", "data.files=[a.txt]") is None
    new = ("data.files=[b.txt]", "init_from=runs/all")
    line = train("run.name=x", *new, "data.validation.old=[a.txt]")
    assert line.startswith("error: data.validation.old: init_from=runs/all was trained on ")
    assert line.endswith("a.txt; leave it out, or name the set for what it is, data.validation.train_old")
    assert train("run.name=y", *new, "data.validation.train_old=[a.txt]") is None


def test_another_tokenizer_is_refused_wherever_it_lies(train, tmp_path):
    own = ("data.tokenizer=tok.json", "model.vocab_size=300")
    byte_tokenizer_json(tmp_path / "tok.json")
    assert train("run.name=own", "data.files=[a.txt]", *own) is None
    assert train("run.name=bytes", "data.files=[a.txt]", "model.vocab_size=300") is None
    line = train("run.name=x", "data.files=[b.txt]", "init_from=runs/bytes", *own)
    assert "init_from=runs/bytes was trained with bytes, not with a tokenizer.json" in line
    line = train("run.name=x", "data.files=[b.txt]", "init_from=runs/own", "model.vocab_size=300")
    assert "init_from=runs/own was trained with a tokenizer.json, not with bytes" in line

    (tmp_path / "moved").mkdir()
    (tmp_path / "tok.json").rename(tmp_path / "moved/tok.json")
    assert train("runs/own", "data.tokenizer=moved/tok.json", "data.cache_dir=cache", command="eval") is None
    byte_tokenizer_json(tmp_path / "tok.json", "<|another|>")
    line = train("runs/own", "data.cache_dir=cache", command="eval")
    assert "data.tokenizer: the file has another content than when runs/own was trained" in line.replace(
        f"{tmp_path}/", ""
    )


def test_documents_that_are_chosen_in_another_way_are_refused(train, tmp_path):
    """20 files are held out whole at 0.5, and 4 of them are not: in blocks of lines."""
    (tmp_path / "many").mkdir()
    for number in range(4):
        (tmp_path / f"many/{number}.txt").write_text(_text(number))
    files = ("data.files=[many/*.txt]", "data.validation_fraction=0.5")
    assert train("run.name=few", *files) is None
    for number in range(4, 30):
        (tmp_path / f"many/{number}.txt").write_text(_text(number))
    line = train("runs/few", "data.cache_dir=cache", command="eval")
    assert "what is held out now may have been trained on" in line


def test_a_changed_file_may_hold_out_what_was_trained_on(train, tmp_path):
    assert train("run.name=run", "data.files=[a.txt]", "data.validation_fraction=0.3") is None
    (tmp_path / "a.txt").write_text("a new first line\n" + _text("a"))
    line = train("runs/run", "data.cache_dir=cache", command="eval")
    assert "what is held out now may have been trained on" in line
