"""Plugins are code: they run where this start names them and nowhere else, and an edited one is another run."""

import dataclasses
import shlex
import shutil

import numpy as np
import pytest
from etils import epath

import hybridnorm_jax as hn
from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.run_identity import check_same_plugins

SOURCE = """
from pathlib import Path

import hybridnorm_jax.model.schemes as schemes

with Path({marker!r}).open("a") as file:
    file.write("x")
schemes.scheme("of_a_plugin")(schemes.SCHEMES[{of!r}].block)
"""
TINY = [
    *("model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.mlp_dim=16", "model.vocab_size=61"),
    *("model.scheme=of_a_plugin", "train.steps=2", "train.batch_size=8", "train.seq_len=8", "eval.batches=1"),
]


pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def new_start(monkeypatch):
    """Makes this process one that has imported no plugin."""

    def forget():
        monkeypatch.setattr(plugins, "_imported", {})
        hn.SCHEMES.pop("of_a_plugin", None)

    forget()
    yield forget
    hn.SCHEMES.pop("of_a_plugin", None)


@pytest.fixture
def write(tmp_path):
    """Writes the plugin; returns its path."""

    def write(of="pre"):
        file = tmp_path / "mine.py"
        file.write_text(SOURCE.format(marker=str(tmp_path / "marker"), of=of))
        return file

    return write


@pytest.fixture
def arguments(tmp_path, write):
    """Of a run with the plugin."""
    for seed, name in enumerate(("tokens", "held")):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 61, 600).astype(np.uint16))
    return [
        *TINY,
        f"run.plugins=[{write()}]",
        f"run.dir={tmp_path}/runs",
        "run.name=run",
        "data.source=tokens",
        "data.validation_fraction=0",
        f"data.files=[{tmp_path}/tokens.npy]",
        f"data.validation.held=[{tmp_path}/held.npy]",
    ]


@pytest.fixture
def trained(arguments, new_start, tmp_path):
    """The directory of a run whose plugin has run, in a process that has imported none."""
    loop.train(parse(arguments))
    (tmp_path / "marker").unlink()
    new_start()
    return tmp_path / "runs/run"


def readers(directory):
    """What reads a run's directory."""
    return {
        "eval": lambda: evaluate_run(str(directory)),
        "load_run": lambda: hn.load_run(str(directory)),
        "resume": lambda: parse([str(directory / "config.yaml")]),
    }


@pytest.mark.parametrize("reader", ["eval", "load_run", "resume"])
def test_what_a_saved_configuration_names_is_not_imported(reader, trained, tmp_path):
    message = r"run\.plugins=\[.*mine\.py\]: a saved configuration runs no code; .* name them yourself: run\.plugins="
    with pytest.raises(ConfigError, match=message):
        readers(trained)[reader]()
    assert not (tmp_path / "marker").exists()


def test_a_report_does_not_import_it_either(trained, tmp_path, capsys):
    main(["lab", "report", str(trained.parent)])
    assert not (tmp_path / "marker").exists()
    assert "a saved configuration runs no code" in capsys.readouterr().err


def test_what_this_start_names_is_imported_once(trained, write, new_start, tmp_path):
    file = str(write())
    assert set(evaluate_run(str(trained), [f"run.plugins=[{file}]"], progress=False).scores) == {"held"}
    assert hn.load_run(str(trained), plugins=[file])[0].model.scheme == "of_a_plugin"
    assert (tmp_path / "marker").read_text() == "x"


def test_an_edited_plugin_is_another_run_and_the_old_source_is_kept(trained, arguments, write, new_start, tmp_path):
    edited = write(of="post")
    for use in (
        lambda: loop.train(parse(arguments)),
        lambda: hn.load_run(str(trained), plugins=[str(edited)]),
        lambda: evaluate_run(str(trained), [f"run.plugins=[{edited}]"]),
    ):
        new_start()
        with pytest.raises(ConfigError, match=r"mine\.py is not the file that .* was trained with; name that file"):
            use()
    (kept,) = (trained / "plugins").rglob("mine.py")
    assert "'pre'" in kept.read_text()
    # The kept source is the same plugin, wherever it lies.
    new_start()
    assert hn.load_run(str(trained), plugins=[str(kept)])[0].model.scheme == "of_a_plugin"


@pytest.fixture
def compare(arguments, new_start):
    """Runs `hybridnorm lab compare` with the plugin, as a new process, for one seed; returns its status."""
    words = [word for word in arguments if not word.startswith(("run.name", "model.scheme"))]
    lab = [
        "lab",
        "compare",
        "lab",
        *words,
        "run.name=lab",
        "schemes=[of_a_plugin]",
        "train.watch_every=null",
        "optimizer.warmup_steps=0",
    ]

    def compare(seed=0):
        new_start()
        return main([*lab, f"seeds=[{seed}]"])

    return compare


def test_a_comparison_does_not_take_the_result_of_an_edited_plugin(compare, write, tmp_path, capsys):
    assert compare() == 0
    assert compare() == 0
    assert "finished before" in capsys.readouterr().out
    write(of="post")
    assert compare() == 2
    assert "mine.py is not the file that" in capsys.readouterr().err
    # As after a divergence before the first save.
    shutil.rmtree(next((tmp_path / "runs/lab").glob("*/checkpoints")))
    assert compare() == 2
    told = capsys.readouterr().err
    assert "mine.py is not the file that" in told
    assert "of_a_plugin-lr0.002-seed0, was trained with; name that file (its source of then is in" in told
    used = next((tmp_path / "runs/lab").glob("*/plugins/used.json"))
    used.write_text("[1]")
    assert compare() == 2
    assert f"{used}: must be a JSON list of the names and digests of plugins" in capsys.readouterr().err


def test_a_report_takes_the_plugins_that_it_asks_for(compare, write, new_start, tmp_path, capsys):
    assert compare(seed=0) == 0
    told = capsys.readouterr().out
    command = shlex.split(told.partition("Next: ")[2])
    report = command[command.index("lab") :]
    assert report == ["lab", "report", f"{tmp_path}/runs/lab", f"run.plugins=[{tmp_path}/mine.py]"]
    new_start()
    assert main(report) == 0
    new_start()
    assert main(report[:-1]) == 2
    assert f"name them yourself: {report[-1]}" in capsys.readouterr().err
    # What an edited plugin made is something else, and so is what it describes.
    write(of="post")
    new_start()
    assert main(report) == 2
    assert "mine.py is not the file that" in capsys.readouterr().err
    # A comparison does not add it to what the report could not compare it with.
    assert compare(seed=1) == 2
    told = capsys.readouterr().err
    assert "lab: of_a_plugin-lr0.002-seed1 and of_a_plugin-lr0.002-seed0 differ in the plugin" in told
    assert "mine.py: what other plugins made cannot be compared; choose another run.name" in told
    assert told.count("\n") == 1


def test_a_saved_plugin_that_no_start_named_is_no_obstacle_for_a_run_without_plugins(arguments, new_start):
    plain = [word for word in arguments if not word.startswith(("run.plugins", "model.scheme"))]
    config = parse(plain)
    loop.train(config)
    with pytest.raises(ConfigError, match=r"run\.plugins: .*mine\.py: .* was trained without it"):
        loop.train(dataclasses.replace(config, run=parse(arguments).run))


@pytest.fixture
def compared(tmp_path, monkeypatch, new_start):
    """Compares saved plugins with what these names are now; returns the line of the refusal, or None."""
    monkeypatch.syspath_prepend(tmp_path)

    def compared(saved, *names):
        try:
            check_same_plugins(saved, plugins.plugins_of(names), where="RUN, step 1", kept=epath.Path(tmp_path))
        except ConfigError as error:
            return str(error)
        return None

    return compared


def test_a_plugin_that_is_another_is_called_what_it_is(compared, tmp_path):
    rule = tmp_path / "a_package/rules/rule.py"
    rule.parent.mkdir(parents=True)
    (tmp_path / "a_package/schemes.py").write_text("import a_package.rules.rule")
    rule.write_text("SCALE = 1.5")
    saved = plugins.to_json(plugins.plugins_of(["a_package.schemes"]))
    assert compared(saved, "a_package.schemes") is None
    rule.write_text("SCALE = 9.0")
    end = ", or start a new run under another run.name"
    wrong = "a_package.schemes is not the module that RUN, step 1, was trained with (rules/rule.py has changed)"
    assert compared(saved, "a_package.schemes") == f"run.plugins: {wrong}; name that module{end}"
    folder = tmp_path / "plugins" / saved[0]["digest"][:12]
    folder.mkdir(parents=True)
    told = compared(saved, "json")
    wrong = "RUN, step 1, was trained with a_package.schemes, which this start does not name"
    assert told == f"run.plugins: {wrong}; name that module (its source of then is in {folder}){end}"


def test_a_version_that_compared_less_of_a_plugin_is_no_fault_of_the_user(compared, tmp_path, capsys):
    (tmp_path / "b_package/inner").mkdir(parents=True)
    for file in ("__init__.py", "rule.py", "inner/__init__.py", "inner/schemes.py"):
        (tmp_path / "b_package" / file).write_text(f"'{file}'")
    # Of b_package.inner those versions read the files of its own folder.
    file = tmp_path / "b_package/inner/schemes.py"
    sources = {name: f"'inner/{name}'" for name in ("__init__.py", "schemes.py")}
    saved = [{"name": "b_package.inner", "digest": "of then", "sources": sources}]
    assert compared(saved, "b_package.inner") is None
    told = capsys.readouterr().err
    wrong = "of the plugin b_package.inner only __init__.py, schemes.py was compared then, which is unchanged"
    assert told == f"note: RUN, step 1: {wrong}; rule.py may have been another\n"
    file.write_text("edited")
    assert "is not the module that RUN, step 1, was trained with (schemes.py has changed)" in compared(
        saved, "b_package.inner"
    )
