"""What is called validation was kept out of training, and its score is the same on any number of devices."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.data.text.sources import find_files, stdlib_corpus
from hybridnorm_jax.errors import ConfigError, DataError
from hybridnorm_jax.evaluation.held_out import check_same_data, check_sets, check_share, training_files
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """trained/a.txt and trained/b.txt, which are trained on, and other.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    for name, text in (("trained/a.txt", "first text"), ("trained/b.txt", "other size"), ("other.txt", "third text")):
        (tmp_path / name).write_text(text)
    return find_files("data.files", ["trained/*.txt"])


SAME = {
    "its path": ["trained/a.txt"],
    "another spelling": ["trained/../trained/./a.txt"],
    "a pattern": ["other.txt", "train*/a*"],
    "a link": ["link.txt"],
    "a linked directory": ["linked/a.txt"],
    "a copy of another name": ["copy.md"],
}


@pytest.mark.parametrize("spelling", SAME)
def test_a_training_file_is_no_validation(spelling, files, tmp_path):
    os.symlink(tmp_path / "trained/a.txt", tmp_path / "link.txt")
    os.symlink(tmp_path / "trained", tmp_path / "linked")
    (tmp_path / "copy.md").write_text("first text")
    with pytest.raises(ConfigError, match=r"^data\.validation\.news: .*trained on; .* data\.validation\.train_news$"):
        check_sets({"news": SAME[spelling]}, files)
    # Its name may say what it is.
    check_sets({"train_news": SAME[spelling]}, files)


def test_other_files_are_validation(files):
    check_sets({"news": ["other.txt"]}, files)  # of the same size as the others
    check_sets({}, files)
    with pytest.raises(DataError, match=r"^data\.validation\.news: no such file"):
        check_sets({"news": ["nowhere.txt"]}, files)


def test_the_standard_library_is_trained_on_too(tmp_path):
    data = RunConfig().data
    assert data.source == "stdlib"
    source = next(file.path for file in stdlib_corpus().files if file.path.name == "argparse.py")
    (tmp_path / "mine.py").write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=r"mine\.py is the same as .*argparse\.py, trained on"):
        check_sets({"mine": [str(tmp_path / "mine.py")]}, training_files(data))


def test_only_the_runs_own_share_is_held_out():
    saved = dataclasses.replace(RunConfig().data, source="text", files=("a.txt",), validation_fraction=0.1)
    nothing = dataclasses.replace(saved, validation_fraction=0.0)
    check_share(saved, saved)
    check_share(saved, nothing)
    for fraction in (0.05, 0.5):
        with pytest.raises(ConfigError, match=r"^data\.validation_fraction: saved 0\.1, asked 0"):
            check_share(saved, dataclasses.replace(saved, validation_fraction=fraction))
    files_changed = ["data.files: saved [a.txt], asked [b.txt]"]
    check_same_data(saved, [], is_same_data=False)
    check_same_data(saved, files_changed, is_same_data=True)  # moved
    check_same_data(nothing, files_changed, is_same_data=False)
    with pytest.raises(ConfigError, match=r"^data\.files: .*'data\.validation\.NAME=\[FILE\]'$"):
        check_same_data(saved, files_changed, is_same_data=False)


SETTINGS = ["train.watch_every=1", "train.watch_sequences=4", "eval.batches=2"]


@pytest.fixture
def trained(tmp_path, small_config):
    """The configuration of a run whose layers are watched as the lab does it, trained for one step on two devices."""
    rng = np.random.default_rng(0)
    for number in range(1, 5):
        np.save(tmp_path / f"{number}.npy", rng.integers(0, 61, 700).astype(np.uint16))
    for number in range(2):
        np.save(tmp_path / f"other{number}.npy", rng.integers(0, 61, 100 + number).astype(np.uint16))
    default = RunConfig()
    files = tuple(str(tmp_path / f"{number}.npy") for number in range(1, 4))
    config = RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path / "runs")),
        model=small_config(num_layers=1),
        data=dataclasses.replace(
            default.data,
            source="tokens",
            files=files,
            validation={"fourth": (str(tmp_path / "4.npy"),)},
            validation_fraction=0.0,
        ),
        train=TrainSection(1, 8, 8),
        mesh=dataclasses.replace(default.mesh, data=2),
    )
    return from_yaml(to_yaml(config), SETTINGS)


def devices(monkeypatch, count):
    """As if there were so many."""
    some = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *_: some)
    monkeypatch.setattr(jax, "device_count", lambda *_: count)


def test_defaults_score_a_run_of_the_lab_on_any_number_of_devices(trained, tmp_path, monkeypatch):
    devices(monkeypatch, 2)
    (score,) = loop.train(trained).values()
    assert score.tokens == 2 * 8 * 8
    for count in (3, 8):
        with monkeypatch.context() as patch:
            devices(patch, count)
            result = evaluate_run(str(tmp_path / "runs/run"), progress=False)
            # The same sequences; what fills up a batch has weight 0.
            assert result.scores["fourth"].tokens == score.tokens
            assert result.scores["fourth"].loss == pytest.approx(score.loss, rel=1e-6)

    with pytest.raises(ConfigError, match=r"^data\.validation\.more: .*1\.npy is trained on"):
        evaluate_run(str(tmp_path / "runs/run"), [f"data.validation.more=[{tmp_path}/1.npy]"], progress=False)
    with pytest.raises(ConfigError, match=r"^data\.validation_fraction: saved 0\.0, asked 0\.5"):
        evaluate_run(str(tmp_path / "runs/run"), ["data.validation_fraction=0.5"], progress=False)
    more = [f"data.validation.more=[{tmp_path}/other0.npy]", f"data.files=[{tmp_path}/other1.npy]"]
    assert set(evaluate_run(str(tmp_path / "runs/run"), more, progress=False).scores) == {"fourth", "more"}
    # Training refuses the same, before it begins.
    wrong = from_yaml(to_yaml(trained), [f"data.validation.more=[{tmp_path}/2.npy]", "run.name=wrong"])
    with pytest.raises(ConfigError, match=r"^data\.validation\.more: "):
        loop.train(wrong)
    assert not (tmp_path / "runs/wrong").exists()


@pytest.mark.parametrize(("asked", "batch"), [(None, 9), (4, 6), (7, 9)])
def test_batches_are_filled_up_to_what_three_devices_share(trained, asked, batch, monkeypatch):
    devices(monkeypatch, 3)
    config = dataclasses.replace(trained, eval=dataclasses.replace(trained.eval, batch_size=asked, batches=2))
    config = from_yaml(to_yaml(config), ["train.watch_every=null", "mesh.data=3"])
    program = Program(config)
    assert program.eval_batch_size == batch
    assert program.eval_sequences == 2 * (asked or 8)
