"""What parameters were trained on is no validation of the run that begins with them, nor of an evaluation."""

import json
import shutil

import numpy as np
import pytest
from lettered_texts import TINY, lettered_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.saved_steps import SavedSteps
from hybridnorm_jax.training.trained_before import Trained, check_validation, is_kept_out

ONE_STEP = [*TINY, "train.steps=1"]

pytestmark = pytest.mark.usefixtures("shared_programs")


def byte_tokenizer_json(path, *extra):
    """A tokenizer.json of byte-level characters and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *extra])
    tokenizer.save(str(path))


@pytest.fixture
def train(command):
    """Trains on text or on something else; returns the one line of an error, or None."""
    return lambda *arguments, source="text": command("train", *ONE_STEP, f"data.source={source}", *arguments)


def test_a_larger_share_than_was_held_out_is_refused_and_the_same_is_not(train):
    assert train("run.name=all", "data.files=[a.txt]", "data.validation_fraction=0") is None
    line = train("run.name=x", "data.files=[a.txt]", "init_from=runs/all", "data.validation_fraction=0.3")
    assert line.startswith(
        "error: data.validation_fraction: saved 0.0, asked 0.3: init_from=runs/all was trained on a.txt"
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


def test_another_tokenizer_is_refused_wherever_it_lies(train, command, tmp_path):
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
    assert command("eval", "runs/own", "data.tokenizer=moved/tok.json", "data.cache_dir=cache") is None
    byte_tokenizer_json(tmp_path / "tok.json", "<|another|>")
    line = command("eval", "runs/own", "data.cache_dir=cache")
    line = line.replace(f"{tmp_path}/", "")
    assert "data.tokenizer: tok.json has another content than the tokenizer that runs/own was trained with" in line


def test_another_tokenizer_of_tokenized_directories_is_refused_though_nobody_named_it(train, command, tmp_path):
    """Their manifests say it, the run keeps it, and whoever begins with it or asks it is compared."""
    for name, *extra in (("own",), ("other", "<|another|>")):
        byte_tokenizer_json(tmp_path / f"{name}.json", *extra)
        for text in "ab":
            out = ["--out", f"{name}_{text}"]
            assert command("tokenize", f"{text}.txt", "--tokenizer", f"{name}.json", *out) is None
    size = "model.vocab_size=300"
    assert train("run.name=run", "data.files=[own_a]", size, source="tokens") is None
    begun = (size, "init_from=runs/run")
    wrong = "error: data: its tokens were made by another tokenizer than those that init_from=runs/run was trained on"
    assert train("run.name=x", "data.files=[other_b]", *begun, source="tokens").startswith(wrong)
    mixture = "data.mixture={one: {source: tokens, files: [%s]}}"
    assert command("train", *ONE_STEP, "run.name=x", mixture % "other_b", *begun).startswith(wrong)
    assert command("train", *ONE_STEP, "run.name=mixed", mixture % "own_a", size) is None
    line = train("run.name=x", "data.files=[other_b]", size, "init_from=runs/mixed", source="tokens")
    assert line.startswith(wrong.replace("runs/run", "runs/mixed"))
    line = train("run.name=x", "data.files=[b.txt]", "data.tokenizer=other.json", *begun)
    assert "other.json has another content than the tokenizer that init_from=runs/run was trained with" in line
    assert "was trained with a tokenizer.json, not with bytes" in train("run.name=x", "data.files=[b.txt]", *begun)
    assert train("run.name=next", "data.files=[own_b]", *begun, source="tokens") is None
    assert train("run.name=text", "data.files=[b.txt]", "data.tokenizer=own.json", *begun) is None

    # Numbers in a file say nothing of themselves: what the run knows is compared with the set.
    np.save(tmp_path / "raw.npy", np.arange(1000, dtype=np.uint16) % 250)
    raw = ("data.files=[raw.npy]", "data.validation_fraction=0", "data.validation.set=[other_b]")
    line = command("eval", "runs/run", *raw).replace(f"{tmp_path}/", "")
    assert line.startswith("error: data: its tokens were made by another tokenizer than those that runs/run was")
    line = command("generate", "runs/run", "--tokenizer", "other.json", "--prompt", "a").replace(f"{tmp_path}/", "")
    assert "other.json has another content than the tokenizer that runs/run was trained with" in line


def test_documents_that_are_chosen_in_another_way_are_refused(train, command, tmp_path):
    """20 files are held out whole at 0.5, and 4 of them are not: in blocks of lines."""
    (tmp_path / "many").mkdir()
    for number in range(4):
        (tmp_path / f"many/{number}.txt").write_text(lettered_text(number))
    files = ("data.files=[many/*.txt]", "data.validation_fraction=0.5")
    assert train("run.name=few", *files) is None
    for number in range(4, 30):
        (tmp_path / f"many/{number}.txt").write_text(lettered_text(number))
    line = command("eval", "runs/few", "data.cache_dir=cache")
    assert "what is held out now may have been trained on" in line


def test_what_the_hash_alone_does_not_choose_depends_on_all_files(train, command, tmp_path):
    """Where the hash chooses no block of a file, its lowest one is held out; with other files it is trained on."""
    (tmp_path / "both").mkdir()
    lowest = {}
    for name in "ab":
        shutil.copy(tmp_path / f"{name}.txt", tmp_path / "both")
        corpus = text_corpus("data.files", [f"{name}.txt"], "text")
        digests = [document.digest for document in corpus.documents(corpus.files[0], whole=False)]
        lowest[name] = int.from_bytes(min(digests)[:8], "big") / 2**64
    chosen, other = sorted("ab", key=lowest.get)
    share = f"data.validation_fraction={sum(lowest.values()) / 2}"
    assert train("run.name=both", "data.files=[both/*.txt]", share) is None
    line = train("run.name=part", f"data.files=[{other}.txt]", share, "init_from=runs/both")
    assert line.startswith(
        f"error: {share}: init_from=runs/both was trained on {other}.txt, also on parts of it that may be"
    )
    assert "because other files are read" in line
    (tmp_path / f"both/{chosen}.txt").unlink()
    line = command("eval", "runs/both", "data.cache_dir=cache")
    assert "what is held out now may have been trained on" in line


def test_a_changed_file_may_hold_out_what_was_trained_on(train, command, tmp_path):
    assert train("run.name=run", "data.files=[a.txt]", "data.validation_fraction=0.3") is None
    (tmp_path / "a.txt").write_text("a new first line\n" + lettered_text("a"))
    line = command("eval", "runs/run", "data.cache_dir=cache")
    assert "what is held out now may have been trained on" in line


def test_what_was_trained_on_before_is_known_along_a_chain_of_runs(train, command):
    """First a.txt alone, then b.txt alone: a.txt is no validation of whatever goes on from there."""
    assert train("run.name=first", "data.files=[a.txt]", "data.validation_fraction=0") is None
    second = ("run.name=second", "data.files=[b.txt]", "init_from=runs/first")
    assert train(*second) is None

    end = "was trained on a.txt; leave it out, or name the set for what it is, data.validation.train_x"
    line = command("eval", "runs/second", "data.validation.x=[a.txt]", "data.cache_dir=cache")
    assert line.startswith("error: data.validation.x: ")
    assert line.endswith(f"runs/second {end}")
    assert command("eval", "runs/second", "data.validation.train_x=[a.txt]", "data.cache_dir=cache") is None
    line = train(*second, "data.validation.x=[a.txt]")  # the run that has ended is taken up again
    assert line == f"error: data.validation.x: init_from=runs/first {end}"
    line = train("run.name=third", "data.files=[a.txt]", "init_from=runs/second")
    assert line.startswith("error: data.validation_fraction: saved 0.0, asked 0.02: init_from=runs/second was trained")

    branch = ("init_from=runs/second", "init_optimizer=true", "optimizer.schedule=constant", "train.steps=2")
    line = train("run.name=branch", "data.files=[b.txt]", *branch, "data.validation.x=[a.txt]")
    assert line == f"error: data.validation.x: init_from=runs/second {end}"


@pytest.mark.long  # test_export.py asks a converted run for its data, too
def test_a_converted_run_knows_what_it_was_trained_on(train, command, tmp_path):
    kind = ("model.scheme=pre", "model.norm=layernorm")
    assert train("run.name=run", "data.files=[a.txt]", *kind) is None
    assert command("convert", "runs/run", "runs/converted", "--form", "pre_rmsnorm") is None
    form = ("model.scheme=pre", "model.attention_norm=layernorm", "model.attention_norm_scale=true")
    form += ("model.norm_scale=false",)
    new = ("data.files=[b.txt]", *form, "init_from=runs/converted")
    line = train("run.name=x", *new, "data.validation.old=[a.txt]")
    assert line.startswith("error: data.validation.old: init_from=runs/converted was trained on a.txt")
    assert train("run.name=new", *new) is None

    again = ("runs/converted", "data.cache_dir=cache")
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "moved/a.txt")
    assert command("eval", *again, "data.files=[moved/a.txt]") is None
    (tmp_path / "a.txt").write_text("a new first line\n" + lettered_text("a"))
    assert "what is held out now may have been trained on" in command("eval", *again)


def test_files_that_are_gone_are_known_by_their_content(train, command, tmp_path):
    assert train("run.name=run", "data.files=[a.txt]") is None
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    other = ("data.files=[b.txt]", "data.validation_fraction=0", "data.validation.x=[c.txt]", "data.cache_dir=cache")
    line = command("eval", "runs/run", *other)
    assert line.endswith("was trained on c.txt; leave it out, or name the set for what it is, data.validation.train_x")


def test_what_cannot_be_known_is_said_and_what_is_known_is_not(train, tmp_path, capsys, monkeypatch):
    def notes(*arguments):
        capsys.readouterr()
        status = main(["train", *arguments, *ONE_STEP, "data.source=text"])
        assert status == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: init_from")]

    assert train("run.name=run", "data.files=[a.txt]") is None
    assert notes("run.name=other", "data.files=[b.txt]", "init_from=runs/run") == []
    (tmp_path / "a.txt").write_text("a new first line\n" + lettered_text("a"))
    (line,) = notes("run.name=edited", "data.files=[a.txt]", "init_from=runs/run")
    end = "was trained on another a.txt; if this is the same text, edited, its validation holds what was trained on"
    assert line == f"note: init_from=runs/run {end}"

    read = SavedSteps.read_data_state
    for state, said in (({"train_tokens": 1}, ["kept no digests of data"]), ({}, [])):  # an old version; parameters
        with monkeypatch.context() as patch:
            patch.setattr(SavedSteps, "read_data_state", lambda self, step, state=state: read(self, step) and state)
            told = notes(f"run.name=of_{len(state)}", "data.files=[b.txt]", "init_from=runs/run")
        assert len(told) == len(said)
        assert all(part in line for part, line in zip(said, told, strict=True))


def test_token_files_need_not_name_their_tokenizer(train, tmp_path):
    byte_tokenizer_json(tmp_path / "tok.json")
    byte_tokenizer_json(tmp_path / "other.json", "<|another|>")
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(ord(name)).integers(0, 256, 20_000).astype("uint16"))
    keys = ("model.vocab_size=300",)
    tokens = ("data.files=[b.npy]", *keys)
    assert train("run.name=tokens", "data.files=[a.npy]", *keys, source="tokens") is None
    named = (*tokens, "data.tokenizer=tok.json", "init_from=runs/tokens")
    assert train("run.name=named", *named, source="tokens") is None
    # Then the run before them may have.
    assert train("run.name=between", *tokens, "init_from=runs/named", source="tokens") is None
    line = train("run.name=x", "data.files=[a.txt]", *keys, "data.tokenizer=other.json", "init_from=runs/between")
    assert "other.json has another content than the tokenizer that init_from=runs/between was trained with" in line


def test_another_text_of_the_same_records_is_refused(train, tmp_path):
    """What is held out has a hash of the text, so another field of the same records holds out others."""
    rows = [json.dumps({"prompt": f"What is {n}?", "completion": f"{n} it is."}) + "\n" for n in range(200)]
    (tmp_path / "qa.jsonl").write_text("".join(rows))
    begin = ["data.files=[qa.jsonl]", "init_from=runs/first"]
    assert train("run.name=first", "data.files=[qa.jsonl]", "data.records=prompt") is None
    line = train("run.name=field", *begin, "data.text_field=prompt")
    assert "data.records=prompt then and data.text_field=prompt now hold out other records" in line
    assert train("run.name=same", *begin, "data.records=prompt") is None
    mixture = "data.mixture={qa: {files: [qa.jsonl], text_field: prompt}, a: {files: [a.txt]}}"
    line = train("run.name=mixed", "init_from=runs/first", mixture, source="stdlib")
    assert "now hold out other records; read the same text of each record, or" in line


def test_what_another_source_would_hold_out_is_refused_as_that():
    file = {"name": "ast.py", "size": 5, "digest": "its"}
    known, now = [Trained("stdlib", 0.02, [file])], [Trained("text", 0.02, [file | {"name": "mine.txt"}])]
    wrong = "RUN was trained on mine.txt, also on parts of it that may be held out now: data.source was stdlib then, "
    with pytest.raises(ConfigError, match=f"data.validation_fraction=0.02: {wrong}"):
        check_validation(known, DataSection(source="text", files=("mine.txt",)), now, where="RUN")


def test_a_changed_library_holds_out_the_same_files():
    """Of the standard library the path is hashed, so another version of Python holds out what this one does."""
    saved = [{"name": f"{name}.py", "size": 5, "digest": f"old {name}"} for name in "abc"]
    now = [{"name": f"{name}.py", "size": 6, "digest": f"new {name}"} for name in "abcd"]
    before = Trained("stdlib", 0.02, saved)

    def kept_out(*files, fraction=0.02):
        return is_kept_out(before, Trained("stdlib", fraction, [*now, *files]))

    assert kept_out()
    assert not kept_out({"name": "moved.py", "size": 5, "digest": "old a"})
    assert kept_out({"name": "empty.py", "size": 0, "digest": ""})
    assert not kept_out(fraction=0.03)
