"""A file as the only argument: it trains at once."""

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_a_text_file_trains_and_holds_a_share_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("".join(f"Line {number} of the book.\n" for number in range(500)))
    tiny = ["model.scheme=pre", "model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.mlp_dim=16"]
    tiny += ["train.sample_tokens=0"]
    train(parse(["book.txt", *tiny, "train.steps=2", "train.seq_len=32", "run.name=a", "data.cache_dir=cache"]))
    shown = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "1 text file: " in shown
    assert "held out (" in shown
    assert "validation " in shown
