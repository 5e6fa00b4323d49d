"""`hybridnorm tokenizer train`, `hybridnorm tokenize` and `hybridnorm data inspect` as a user calls them."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import REPOSITORY, environment

from hybridnorm_jax.commands.main import main

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = random.Random(0)
    words = ["one", "wörd", "and", "another", "of", "many\n"]
    for name in ("a", "b"):
        lines = [json.dumps({"body": " ".join(rng.choices(words, k=40))}) for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["tokenizer", "train", "*.jsonl", "--vocab-size", "280", "data.text_field=body"]
TOKENIZE = ["tokenize", "*.jsonl", "--tokenizer", "t.json", "--out", "out", "data.text_field=body", "--processes", "2"]


def ended(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect_refuses_a_source_that_is_read_too_often_as_train_does(folder, capsys):
    mixture = "data.mixture={a: {files: [a.jsonl], epochs: 0.5}, b: {files: [b.jsonl]}}"
    asked = [mixture, "data.text_field=body", "train.steps=200", "train.seq_len=32", "data.cache_dir=cache"]
    status, out, line = ended(capsys, "data", "inspect", *asked)
    assert status == 2
    assert " of at most 0.5" in out
    assert line.startswith("error: data.mixture.a.epochs=0.5: at the end of training, step 200, the source is read ")
    assert ended(capsys, "train", *asked, "run.dir=runs")[::2] == (status, line)


def test_nothing_is_left_of_a_directory_that_never_had_a_token(folder, capsys):
    (folder / "empty.jsonl").write_text("")
    command = ["tokenize", "empty.jsonl", "--tokenizer", "bytes", "--out", "new", "--processes", "1"]
    status, _, line = ended(capsys, *command)
    assert (status, "empty.jsonl" in line) == (2, True)
    assert not (folder / "new").exists()
    (folder / "new").mkdir()  # the user's own stays
    assert ended(capsys, *command)[0] == 2
    assert (folder / "new").is_dir()


def test_from_text_to_the_windows_of_a_run(folder, capsys):
    assert ended(capsys, *TRAIN, "--out", "t.json")[0] == 0
    assert ended(capsys, *TRAIN, "--out", "again.json")[0] == 0
    assert (folder / "t.json").read_bytes() == (folder / "again.json").read_bytes()
    content = json.loads((folder / "t.json").read_text())
    assert len(content["model"]["vocab"]) == 280
    assert content["added_tokens"][0]["content"] == "<|endoftext|>"
    status, out, _ = ended(capsys, *TOKENIZE)
    assert status == 0
    assert "120 documents, 0 dropped" in out
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 280
    status, out, _ = ended(capsys, *TOKENIZE)
    assert (status, "is whole already; nothing is done" in out) == (0, True)
    run = [
        "data.files=[out]",
        "data.tokenizer=t.json",
        "model.vocab_size=300",
        "train.seq_len=64",
        "train.batch_size=4",
    ]
    status, out, _ = ended(capsys, "data", "inspect", "quickstart", *run, "--rows", "1", "--seconds", "0.1")
    assert status == 0
    assert "tokenized text out: 120 documents" in out
    assert "row 0:\n  segment 1: 64 tokens, positions 0 to 63, 64 targets count" in out
    assert " tokens/s for each core" in out


def test_a_directory_is_named_like_a_file(folder, capsys):
    assert ended(capsys, "tokenize", "a.jsonl", "--tokenizer", "bytes", "--out", "out", "data.text_field=body")[0] == 0
    status, out, _ = ended(
        capsys, "data", "inspect", "out", "train.seq_len=64", "--seconds", "0", "model.vocab_size=257"
    )
    assert (status, "tokenizer bytes" in out) == (0, True)


def test_inspect_says_the_shares_of_a_mixture_and_whose_a_row_is(folder, capsys):
    assert ended(capsys, "tokenize", "a.jsonl", "--tokenizer", "bytes", "--out", "out", "data.text_field=body")[0] == 0
    mixture = "{made: {source: tokens, files: [out], weight: 3}, own: {source: stdlib, weight: 1}}"
    run = ["train.seq_len=64", f"data.mixture={mixture}", "train.batch_size=8"]
    status, out, err = ended(capsys, "data", "inspect", "quickstart", *run, "--rows", "8", "--seconds", "0")
    assert (status, err.startswith("error")) == (0, False)
    assert re.search(r"^made +[\d,]+ +75\.\d\d%", out, re.MULTILINE)
    rows = re.findall(r"^row \d of (\w+):$", out, re.MULTILINE)
    assert sorted(rows) == ["made"] * 6 + ["own"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "a.jsonl"], "the following arguments are required: --tokenizer, --out"),
        ([*TOKENIZE, "--processes", "0"], "--processes 0: must be from 1"),
        ([*TOKENIZE, "--shard-tokens", "3"], "--shard-tokens 3: must be from 1,024"),
        ([*TOKENIZE, "--out", "a.jsonl"], "--out a.jsonl: is a file"),
        ([*TOKENIZE, "--out", "."], "--out .: holds other files"),
        (
            [*TOKENIZE, "--out", "gs://bucket/x"],
            "--out gs://bucket/x: tokens are written to a local disk; name a directory of this machine, and copy it "
            "when it is whole: gcloud storage rsync --recursive DIR gs://bucket/x",
        ),
        (
            [*TOKENIZE, "--out", "https://server/x"],
            "--out https://server/x: tokens are written to a local disk; name a directory of this machine",
        ),
        ([*TOKENIZE, "nowhere.txt"], "FILE: no such file: nowhere.txt"),
        ([*TOKENIZE, "stdlib"], "stdlib: stands alone"),
        ([*TOKENIZE, "--tokenizer", "nowhere.json"], "data.tokenizer=nowhere.json: nowhere.json: cannot be read"),
        ([*TOKENIZE, "--tokenizer", "a.jsonl"], "data.tokenizer=a.jsonl: not a tokenizer.json"),
        ([*TOKENIZE, "--tokenizer", "bytes", "data.text_field=text"], "the record has no field 'text'"),
        ([*TOKENIZE, "train.steps=3"], "train.steps=3: a key of `hybridnorm train`, not of `hybridnorm tokenize`"),
        (["tokenizer", "trian"], "tokenizer trian: no such command; did you mean 'train'?"),
        ([*TRAIN, "--out", "x.json", "--vocab-size", "256"], "--vocab-size 256: must be from 257"),
        ([*TRAIN, "--out", "a.jsonl"], "--out a.jsonl: is there already"),
        ([*TRAIN, "--out", "no/x.json"], "there is no directory"),
        (["data", "show"], "data show: no such command"),
        (["data", "inspect", "--rows", "-1"], "--rows -1: must be from 0"),
        (["data", "inspect", "--rows", "x"], "argument --rows: invalid int value"),
    ],
)
def test_what_cannot_be_ends_in_one_line(folder, capsys, arguments, message):
    status, _, err = ended(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_full_disk_is_said_and_the_same_command_goes_on(folder, capsys, monkeypatch):
    command = ["tokenize", "*.jsonl", "--tokenizer", "bytes", "--out", "out", "data.text_field=body"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, _, err = ended(capsys, *command)
    assert status == 2
    assert err == "error: --out out: no space left; make room there, and the same command goes on\n"
    status, _, err = ended(capsys, *command, "data.validation_fraction=0.5")
    assert "was made, or begun, with other inputs (fraction differ)" in err
    assert ended(capsys, *command)[0] == 0


def _command(folder, *arguments):
    return [sys.executable, "-m", "hybridnorm_jax", "tokenize", *arguments, "--tokenizer", "t.json"]


@pytest.mark.slow
def test_twenty_kills_of_the_real_command_give_the_same_files(folder, capsys):
    assert ended(capsys, *TRAIN, "--out", "t.json")[0] == 0
    text = (folder / "a.jsonl").read_text()
    with open(folder / "large.jsonl", "w") as stream:
        for number in range(1500):
            stream.write(text.replace("one", f"one{number}") + "\n")
    arguments = ("large.jsonl", "data.text_field=body", "--shard-tokens", "100000", "--drop-duplicates")
    options = {"env": environment(1) | {"PYTHONPATH": str(REPOSITORY)}, "cwd": folder, "stderr": subprocess.PIPE}
    subprocess.run(_command(folder, *arguments, "--out", "whole"), check=True, stdout=subprocess.PIPE, **options)
    rng, kills, stopped = random.Random(0), 0, 0
    while kills < 20:
        process = subprocess.Popen(_command(folder, *arguments, "--out", "killed"), stdout=subprocess.PIPE, **options)
        time.sleep(rng.uniform(1, 8))
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        _, err = process.communicate()
        if process.returncode == 0:
            break  # it was whole before the kill
        assert process.returncode in (-signal.SIGKILL, 75, 143)
        stopped += b"what was tokenized is kept; the same command goes on" in err
        kills += 1
    subprocess.run(_command(folder, *arguments, "--out", "killed"), check=True, stdout=subprocess.PIPE, **options)
    assert kills > 3
    assert stopped > 0

    def contents(name):
        return {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}

    assert contents("killed") == contents("whole")
    assert len(contents("whole")) > 10


def _proportional_megabytes(root):
    """The memory of a process and of all that descend from it, each page that several share counted once."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stream:
                    children.setdefault(int(stream.read().rpartition(")")[2].split()[1]), []).append(int(entry))
            except OSError:
                continue
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            with open(f"/proc/{process}/smaps_rollup") as stream:
                total += next(int(line.split()[1]) for line in stream if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024


def _peak_megabytes(command, folder):
    """The most memory that a command and its processes have had at once."""
    process = subprocess.Popen(command, env=environment(1) | {"PYTHONPATH": str(REPOSITORY)}, cwd=folder)
    peak, done = 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, _proportional_megabytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.wait() == 0
    done.set()
    watcher.join()
    print(f"peak {peak:.0f} MB")
    return peak


LINE = "one wörd and another of many words, and 日本 too "


@pytest.mark.slow
def test_two_processes_need_less_than_a_gigabyte_for_long_and_for_many_documents(folder, capsys):
    """A record of 20 MB, a text file of 12 MB that is one document, and 50,000 short records."""
    assert ended(capsys, *TRAIN, "--out", "t.json")[0] == 0
    with open(folder / "a.jsonl", "w") as stream:
        for number in range(50_000):
            stream.write(f'{{"body": "{number} {LINE}"}}\n')
        stream.write(json.dumps({"body": LINE * (20_000_000 // len(LINE.encode()))}, ensure_ascii=False) + "\n")
    (folder / "c.txt").write_text((LINE + "\n") * (12_000_000 // len(LINE.encode())))
    command = _command(folder, "a.jsonl", "c.txt", "data.text_field=body", "--out", "out", "--processes", "2")
    assert 100 < _peak_megabytes([*command, "--drop-duplicates", "data.validation_fraction=0"], folder) < 700


@pytest.mark.long
def test_the_longest_record_needs_less_than_a_gigabyte(folder):
    """Two of 60 MB, in which one character makes Python store each in four bytes; and a text file of 200 MB."""
    with open(folder / "a.jsonl", "w") as stream:
        for number in range(2):
            text = f"{number} and 🙂 " + "some words " * 5_700_000
            stream.write(json.dumps({"body": text}, ensure_ascii=False) + "\n")
    with open(folder / "c.txt", "w") as stream:
        for _ in range(2000):
            stream.write((LINE + "\n") * 2000)
    command = _command(folder, "a.jsonl", "c.txt", "data.text_field=body", "--out", "out", "--processes", "2")
    command[command.index("t.json")] = "bytes"
    assert 100 < _peak_megabytes([*command, "data.validation_fraction=0"], folder) < 1000
