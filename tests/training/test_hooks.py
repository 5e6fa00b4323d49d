"""The hooks of the training loop: when each is called, in what order, and that the loop knows none of them by name."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import REQUEUE, RunStopped
from hybridnorm_jax.training import hooks, loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.built_in import built_in_hooks
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.metrics_writer import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.stopping import StopSignals

STEPS = 7
FILES = [file for file in Path(hooks.__file__).parent.glob("*.py") if file.name != "__init__.py"]


pytestmark = pytest.mark.usefixtures("shared_programs")


class Recorder(Hook):
    """A hook as a user writes it: notes what is called, and with which step."""

    def __init__(self, every, calls, name="own"):
        self.every, self.calls, self.name = every, calls, name

    def note(self, *what):
        self.calls.append((self.name, *what))

    def start(self, run):
        self.note("start", run.step)

    def before_step(self, run):
        self.note("before_step", run.step + 1)

    def before_update(self, run, batch):
        assert batch["tokens"].shape == (1, 8, 8)
        assert int(run.state.step) == run.step
        self.note("before_update", run.step + 1)

    def after_step(self, run):
        assert int(run.state.step) == run.step
        self.note("after_step", run.step)

    def on_numbers(self, run, numbers):
        assert np.isfinite(numbers.metrics["loss"])
        assert not numbers.skipped
        self.note("on_numbers", numbers.step)

    def stopped(self, run):
        self.note("stopped", run.step)
        return f"the hook saw step {run.step}"

    def end(self, run):
        self.note("end", run.step)

    def close(self):
        self.note("close")


@pytest.fixture
def config(tmp_path, small_config):
    """Seven steps over random tokens, saved only at the end."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default, files = RunConfig(), (str(tmp_path / "tokens.npy"),)
    return RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path)),
        model=small_config(scheme="pre", num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=files, validation={"train_same": files}, validation_fraction=0.0
        ),
        train=TrainSection(STEPS, 8, 8, log_every=100),
        checkpoint=dataclasses.replace(default.checkpoint, every=100),
        eval=dataclasses.replace(default.eval, every=100, batches=1),
    )


def _stop_before_step(patch, step):
    """The `step`-th poll of this process is told to stop."""
    poll, polls = StopSignals.poll, []

    def told(self):
        polls.append(None)
        if len(polls) == step:
            raise RunStopped(REQUEUE, "told to")
        poll(self)

    patch.setattr(StopSignals, "poll", told)


def _steps(calls, method):
    return [step for _, name, *step in calls for step in step if name == method]


def test_a_hook_is_called_in_its_steps_and_in_the_documented_order(config):
    calls = []
    loop.train(config, hooks=[Recorder(1, calls)])
    # The numbers of a step come after the update of the next one, those of the last step as soon as they are there.
    expected = [("own", "start", 0)]
    for step in range(1, STEPS + 1):
        expected += [("own", "before_step", step), ("own", "before_update", step)]
        expected += [("own", "on_numbers", step - 1)] if step > 1 else []
        expected += [("own", "on_numbers", step)] if step == STEPS else []
        expected += [("own", "after_step", step)]
    assert calls == [*expected, ("own", "end", STEPS), ("own", "close")]


@pytest.mark.parametrize(
    ("every", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7]), (None, [])]
)
def test_every_counts_from_the_beginning_of_the_run_also_after_a_stop(every, due, config, monkeypatch):
    calls, again = [], []
    with monkeypatch.context() as patch:
        _stop_before_step(patch, 5)
        with pytest.raises(RunStopped, match="step 4 is saved; the hook saw step 4; the same command goes on"):
            loop.train(config, hooks=[Recorder(every, calls)])
    loop.train(config, hooks=[Recorder(every, again)])
    for method in ("before_update", "after_step", "on_numbers"):
        assert _steps(calls, method) == [step for step in due if step <= 4]
        assert _steps(again, method) == [step for step in due if step > 4]
    # The stop comes after before_step, which looks ahead.
    assert _steps(calls, "before_step") == [step for step in due if step <= 5]
    assert calls[-2:] == [("own", "stopped", 4), ("own", "close")]
    assert ("own", "end", 4) not in calls
    assert again[0] == ("own", "start", 4)
    assert again[-2:] == [("own", "end", STEPS), ("own", "close")]


class _FailsToClose(Hook):
    def close(self):
        raise OSError("no space for the summary")


def test_what_ends_a_run_is_not_hidden_by_a_hook_that_fails_to_close(config, monkeypatch, capfd):
    calls = []
    with monkeypatch.context() as patch:
        _stop_before_step(patch, 3)
        with pytest.raises(RunStopped, match="step 2 is saved"):
            loop.train(config, hooks=[Recorder(1, calls), _FailsToClose()])
    assert calls[-1] == ("own", "close")
    assert "_FailsToClose.close: no space for the summary\n" in capfd.readouterr().err
    with pytest.raises(OSError, match="no space for the summary"):
        loop.train(config, hooks=[Recorder(1, calls), _FailsToClose()])
    assert calls[-1] == ("own", "close")


def test_numbers_are_not_read_while_they_are_given_out(config):
    class ReadsMore(Hook):
        def on_numbers(self, run, numbers):
            run.read_late()

    with pytest.raises(RuntimeError, match=r"^run\.read_late\(\) in on_numbers: later hooks would get"):
        loop.train(config, hooks=[ReadsMore()])


def test_hooks_are_called_in_the_order_of_the_list_and_closed_in_reverse(config, monkeypatch):
    calls = []

    class Fails(Hook):
        def after_step(self, run):
            if run.step == 2:
                raise KeyError("planted")

    built_in = [
        (MetricsWriter, "write", lambda self, step, values: ("write", step)),
        (Checkpoints, "save", lambda self, step, *_, **__: ("save", step)),
        (Program, "eval_step", lambda self, *_, step: ("eval_step",)),
    ]
    for owner, name, described in built_in:
        original = getattr(owner, name)

        def spied(*arguments, original=original, described=described, **keys):
            calls.append(described(*arguments, **keys))
            return original(*arguments, **keys)

        monkeypatch.setattr(owner, name, spied)
    with pytest.raises(KeyError, match="planted"):
        loop.train(
            dataclasses.replace(
                config,
                checkpoint=dataclasses.replace(config.checkpoint, every=2),
                eval=dataclasses.replace(config.eval, every=2),
            ),
            hooks=[Recorder(2, calls, "first"), Recorder(2, calls, "second"), Fails()],
        )
    assert calls == [
        ("first", "start", 0),
        ("second", "start", 0),
        ("first", "before_step", 2),
        ("second", "before_step", 2),
        ("first", "before_update", 2),
        ("second", "before_update", 2),
        # Numbers are read before the save, and the save comes before the evaluation of the same step.
        ("first", "on_numbers", 2),
        ("second", "on_numbers", 2),
        ("write", 2),
        ("save", 2),
        ("eval_step",),
        ("write", 2),
        ("first", "after_step", 2),
        ("second", "after_step", 2),
        ("second", "close"),
        ("first", "close"),
    ]


def test_a_hook_may_stop_the_run_when_it_sees_the_numbers(config, tmp_path):
    class Enough(Hook):
        def on_numbers(self, run, numbers):
            if numbers.step == 2:
                raise RunStopped(REQUEUE, "enough")

    with pytest.raises(RunStopped, match="step 3 is saved"):  # which the device had begun
        loop.train(config, hooks=[Enough()])
    (record,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 3
    assert len(record["train/losses"]) == 3


def test_every_built_in_hook_keeps_to_its_every(config, tmp_path, monkeypatch):
    traced, step, train_step = [], [0], Program.train_step

    def counted(self, state, batch):
        step[0] += 1
        return train_step(self, state, batch)

    monkeypatch.setattr(Program, "train_step", counted)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: traced.append((step[0] + 1, path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append((step[0], None)))
    steps = 11
    asked = dataclasses.replace(
        config,
        train=TrainSection(steps, 8, 8, log_every=4, watch_every=5, profile=True),
        checkpoint=dataclasses.replace(config.checkpoint, every=3, keep=10),
        eval=dataclasses.replace(config.eval, every=2, batches=1),
    )
    loop.train(asked)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    def written(key):
        return [record["step"] for record in records if key in record]

    assert written("train/loss") == [4, 8, 11]
    assert written("watch/stream_rms") == [1, 5, 10]  # the first too, and not the last
    assert written("eval/train_same/loss") == [2, 4, 6, 8, 10, 11]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        f"{number:06d}" for number in (3, 6, 9, 11)
    ]
    assert traced == [(2, str(tmp_path / "run/profile")), (6, None)]
    # All other hooks are due in every step.
    assert {type(hook).__name__ for hook in built_in_hooks(asked) if hook.every == 1} == {
        *("ProgressBar", "SkippedSteps", "Profile")
    }
    never = {type(hook).__name__ for hook in built_in_hooks(config) if hook.every is None}
    assert never == {"Profile", "LayerWatch", "LocalSaving"}


def test_a_profile_ends_with_a_run_that_is_stopped_or_short(config, tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: traced.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    profiled = dataclasses.replace(config, train=dataclasses.replace(config.train, profile=True))
    with monkeypatch.context() as patch:
        _stop_before_step(patch, 4)
        with pytest.raises(RunStopped, match="step 3 is saved"):
            loop.train(profiled)
    assert traced == ["start", "stop"]
    loop.train(profiled)  # steps 4 to 7, so 5 to 7 are profiled
    assert traced == ["start", "stop"] * 2


def _names(tree):
    """Every name that a module uses, imports among them."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }


def test_the_loop_names_no_hook_and_no_hook_names_another(config):
    names = {type(hook).__name__ for hook in built_in_hooks(config)}
    assert len(names) == 8
    for module in (loop, inspect.getmodule(loop.Run)):
        assert not names & _names(ast.parse(inspect.getsource(module)))
    for file in FILES:
        tree = ast.parse(file.read_text())
        own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert file.name == "built_in.py" or not (names & _names(tree)) - own
    # Each built-in hook has a file of its own.
    assert len({inspect.getfile(type(hook)) for hook in built_in_hooks(config)}) == len(names)


def test_a_profile_that_cannot_be_written_stops_nothing(config, monkeypatch, capfd):
    def full():
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, profile=True)))
    line = "train.profile=true: No space left on device; the run goes on without a profile"
    assert capfd.readouterr().err.count(line) == 1
