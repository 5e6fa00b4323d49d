"""Commands in a folder of texts."""

import pytest
from lettered_texts import lettered_text

from hybridnorm_jax.commands.main import main


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with a.txt, b.txt and c.txt; returns the one line of an error, or None.

    `command.out` is what the last one printed.
    """
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(lettered_text(name))

    def start(*arguments):
        status = main(list(arguments))
        told = capsys.readouterr()
        start.out = told.out
        if status == 0:
            return None
        (line,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
        return line

    return start
