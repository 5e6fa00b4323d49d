"""Which parameters the commands take of a run that averages them, and that they say so."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.generation import ready_parameters

TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "train.batch_size=8"),
    *("train.seq_len=16", "train.steps=4", "eval.batches=1", "data.source=text", "model.scheme=pre"),
    *("model.norm=layernorm", "optimizer.learning_rate=3e-2", "optimizer.ema_decay=0.5", "run.name=averaged"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run that averages its parameters; (averaged, plain) parameters by `plain`."""
    directory = tmp_path_factory.mktemp("averaged")
    (directory / "a.txt").write_text("abc def\n" * 400)
    keys = [f"data.files=[{directory}/a.txt]", f"run.dir={directory}", f"data.cache_dir={directory}/cache"]
    assert main(["train", *TINY, *keys]) == 0
    return f"{directory}/averaged", {plain: hn.load_run(f"{directory}/averaged", plain=plain)[1] for plain in (0, 1)}


def _options(plain):
    return ["--plain"] if plain else []


def _assert_same(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("plain", [0, 1])
def test_export_takes_and_names_them(plain, run, tmp_path, capsys):
    directory, params = run
    out = tmp_path / "out"
    assert main(["export", f"{directory}@4", str(out), "--format", "safetensors", *_options(plain)]) == 0
    _assert_same(unflatten_dict(load_file(out / "model.safetensors"), sep="/"), params[plain])
    which = "parameters that are not averaged" if plain else "averaged parameters"
    assert f"step 4 of {directory}@4, {which}\n" in capsys.readouterr().out
    said = "not the average" if plain else "- these weights are the average"
    assert said in (out / "README.md").read_text()


@pytest.mark.parametrize("plain", [0, 1])
def test_convert_takes_and_names_them(plain, run, tmp_path, capsys):
    directory, _ = run
    out = str(tmp_path / "out")
    assert main(["convert", directory, out, "--form", "pre_rmsnorm", *_options(plain)]) == 0
    which = "parameters that are not averaged" if plain else "averaged parameters"
    assert f"{directory}: run, step 4, {which}, pre, 1 layers" in capsys.readouterr().out
    # What is written has one set of parameters: it scores as what it was made of.
    losses = []
    for scored in ([directory, *_options(plain)], [out]):
        assert main(["eval", *scored, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sets"]["validation"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_eval_says_which(run, capsys):
    directory, _ = run
    losses = {}
    for plain, which in ((0, "averaged parameters"), (1, "parameters that are not averaged")):
        assert main(["eval", directory, *_options(plain)]) == 0
        assert f"{directory}/checkpoints/000004, {which}: loss in nats per token" in capsys.readouterr().out
        assert main(["eval", directory, "--json", *_options(plain)]) == 0
        result = json.loads(capsys.readouterr().out)
        losses[result["parameters"]] = result["sets"]["validation"]["loss"]
    assert set(losses) == {"averaged", "plain"}
    assert abs(losses["averaged"] - losses["plain"]) > 1e-3
    assert main(["eval", directory, "eval.plain=true"]) == 2
    assert capsys.readouterr().err == "error: eval.plain=true: a key of training; here it is --plain\n"


@pytest.mark.parametrize("plain", [0, 1])
def test_generate_takes_them(plain, run, monkeypatch, capsys):
    directory, params = run
    taken, original = [], ready_parameters.ready

    def ready(model, given):
        taken.append(given)
        return original(model, given)

    monkeypatch.setattr(ready_parameters, "ready", ready)
    assert main(["generate", directory, "--prompt", "abc", "--max-tokens", "2", *_options(plain)]) == 0
    _assert_same(taken[0], params[plain])
