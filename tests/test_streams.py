"""Standard output and standard error that are closed, full or of another encoding."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridnorm_jax.commands.main import exit_status, main
from hybridnorm_jax.streams import prepare_streams, sturdy_streams

REPOSITORY = Path(__file__).parents[1]


def test_output_whose_reader_has_gone_is_said_once_and_stops_nothing(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    with sturdy_streams():
        for number in range(3):
            print(number, flush=True)
    sys.stdout.close()  # what was left in its buffer is dropped and no error
    assert capsys.readouterr().err == "standard output: Broken pipe; the command goes on without it\n"


def test_output_on_a_full_disk_is_said_once_and_stops_nothing(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with sturdy_streams():
            print("x" * 100_000)
            print("more", flush=True)
    assert capsys.readouterr().err == "standard output: No space left on device; the command goes on without it\n"


def test_what_an_encoding_lacks_is_written_as_an_escape(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="latin-1"))
    with sturdy_streams():
        print("é … \udcff")
    assert buffer.getvalue() == b"\xe9 \\u2026 \\udcff\n"


def test_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr
    with sturdy_streams(), sturdy_streams():
        print("said")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"


def test_an_error_has_its_status_where_standard_error_is_full(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["no-such-command"]) == 2


def test_a_path_below_no_home_directory_ends_in_one_line(capsys):
    def command():
        raise RuntimeError("Could not determine home directory.")

    assert exit_status(command) == 2
    assert capsys.readouterr().err == (
        "error: a path that starts with ~: this user has no home directory; write the whole path\n"
    )


def test_bytes_that_are_no_text_are_refused(capsys):
    assert main(["train", "run.name=gr\udcf6\udcdfe"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run.name=gr\\udcf6\\udcdfe: not UTF-8 text; rename what it names")


@pytest.mark.parametrize(
    ("shell", "status", "says"),
    [
        ("{} schemes >&-", 0, ""),
        ("{} schemes <&- >/dev/full", 2, "error: standard output: No space left on device\n"),
        ("{} nope 2>&-", 2, ""),
    ],
)
def test_streams_that_were_never_open(shell, status, says):
    command = shell.format(f"{sys.executable} -m hybridnorm_jax")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (status, says)


@pytest.mark.parametrize(("encoding", "errors"), [("ascii", "strict"), ("ascii", "surrogateescape")])
def test_a_character_that_standard_output_lacks_is_an_escape_in_every_locale(encoding, errors, monkeypatch):
    """In the locale C Python takes "surrogateescape" and not "strict"."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors))
    prepare_streams()
    print("a\N{EURO SIGN}", flush=True)
    assert written.getvalue() == b"a\\u20ac\n"
