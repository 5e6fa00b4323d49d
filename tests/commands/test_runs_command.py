"""`hybridnorm runs` and `hybridnorm runs compare`: what they print."""

import dataclasses
import json

import jax
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.yaml_files import to_yaml

TINY = ["model.d_model=8", "model.num_layers=1", "model.num_heads=1", "model.mlp_dim=8", "model.vocab_size=257"]


def make_run(directory, *words, losses=(3.0, 2.5, 2.25), score=2.0, versions=None):
    """A run as training leaves it, of as many steps as it has losses."""
    directory.mkdir()
    config = parse(["quickstart", *TINY, f"train.steps={len(losses)}", f"run.name={directory.name}", *words])
    (directory / "config.yaml").write_text(to_yaml(config))
    records = [{"step": len(losses), "train/loss": losses[-1], "train/losses": list(losses), "tokens_per_second": 9.0}]
    records += [{"step": len(losses), "eval/validation/loss": score}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    about = {"versions": versions or {"jax": "0.1"}, "devices": "1 x cpu"}
    stamp = "2026-11-28T09:56:48Z"
    (directory / "log.txt").write_text(f"{stamp} start: {json.dumps(about)}\n{stamp} end: finished\n")
    return config


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_a_folder_as_a_table_and_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["runs"]) == 0
    assert lines(capsys) == ["runs: no runs in it"]
    make_run(tmp_path / "runs/b", "model.scheme=pre")
    make_run(tmp_path / "runs/a", "model.scheme=peri", score=2.5)
    assert main(["runs", "--sort", "validation"]) == 0
    heading, *rows = [line.split() for line in lines(capsys)]
    assert heading == ["name", "scheme", "step", "train", "loss", "validation", "tokens/s", "age", "status"]
    assert [row[:6] for row in rows] == [
        ["b", "pre", "3/3", "2.2500", "2.0000", "9"],
        ["a", "peri", "3/3", "2.2500", "2.5000", "9"],
    ]
    assert {row[-1] for row in rows} == {"finished"}
    assert main(["runs", "runs", "--json", "--sort", "name"]) == 0
    found = json.loads("\n".join(lines(capsys)))
    assert [(run["name"], run["validation_loss"]) for run in found] == [
        ("a", {"validation": 2.5}),
        ("b", {"validation": 2.0}),
    ]


def test_runs_that_differ(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(
        tmp_path / "b", "train.seed=1", "train.log_every=5", losses=(3.0, 2.75, 2.0), score=1.5, versions={"jax": "0.2"}
    )
    make_run(tmp_path / "c", "train.log_every=5")
    paths = [str(tmp_path / name) for name in "abc"]
    assert main(["runs", "compare", *paths]) == 0
    found = lines(capsys)
    assert f"A  {paths[0]}: hybrid_star, finished, step 3 of 3" in found
    rows = [line.split() for line in found]
    assert ["*", "train.seed", "0", "1", "0"] in rows
    assert ["train.log_every", "10", "5", "5"] in rows
    # What decides the training comes first.
    assert rows.index(["*", "train.seed", "0", "1", "0"]) < rows.index(["train.log_every", "10", "5", "5"])
    assert "  A and B: differ first at step 2: 2.5 and 2.75" in found
    assert "  A and C: the same numbers in all 3 steps that both have" in found
    assert ["validation/loss", "2.0000", "(step", "3)", "1.5000", "(step", "3)", "2.0000", "(step", "3)"] in rows
    assert ["jax", "0.1", "0.2", "0.1"] in rows
    # Without checkpoints nothing says what they were trained on.
    assert found[found.index("Data") + 1] == "  unknown: not all of these runs say it"

    assert main(["runs", "compare", *paths[:2], "--json"]) == 0
    found = json.loads("\n".join(lines(capsys)))
    assert found["losses"] == [{"compared": 3, "first": 2, "before": 2.5, "now": 2.75}]
    assert {"key": "train.seed", "decides_training": True, "values": [0, 1]} in found["keys"]


def test_what_a_checkpoint_says_counts(tmp_path, capsys):
    for name, scheme in (("a", "pre"), ("b", "peri")):
        config = parse(["quickstart", *TINY, f"model.scheme={scheme}"])
        params = hn.Decoder(config.model).init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
        hn.save_run(str(tmp_path / name), config, params, step=7)
        edited = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=5))
        (tmp_path / name / "config.yaml").write_text(to_yaml(edited))
    assert main(["runs", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    found = lines(capsys)
    assert f"A  {tmp_path}/a: pre, saved, step 7 of 700" in found
    rows = [line.split() for line in found]
    assert ["*", "model.scheme", "pre", "peri"] in rows
    assert not any("train.seed" in row for row in rows)
    assert found[found.index("Plugins") + 1] == "  the same"
    assert "  A and B: have no step in common" in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "nowhere"], "nowhere: no such directory; name one with runs"),
        (["runs", ""], "'': an empty name; name a directory"),
        (["runs", "ftp://host/x"], "ftp://host/x: must be a directory of this machine, or begin with gs://"),
        (["runs", "compare", "ftp://host/x", "."], "ftp://host/x: must be a directory of this machine, or begin"),
        (["runs", "compare", "nowhere", "."], "nowhere: no such directory"),
        (["runs", "compare", "."], "runs compare: 1 run(s); name 2 to 26 of them"),
        (["runs", "compare", ".", "."], ".: no run, it has no config.yaml"),
        (["runs", "--sort", "size"], "argument --sort: invalid choice: 'size'"),
        (["runs", "--dry-run"], "--dry-run: an option of `hybridnorm train`, not of `hybridnorm runs`"),
        (["runs", "train.steps=3"], "train.steps=3: a key of `hybridnorm train`, not of `hybridnorm runs`"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
