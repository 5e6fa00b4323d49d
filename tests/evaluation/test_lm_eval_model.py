"""The harness gets the same from our model as from its own `hf` model with the same weights, request by request."""

import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from local_model import (
    TASKS,
    WINDOW,
    one_device_program,
    parameters,
    run_config,
    write_huggingface,
    write_tokenizer,
)

from hybridnorm_jax.data.tokenizers import load_tokenizer
from hybridnorm_jax.evaluation.tasks import evaluate_tasks, open_tasks
from hybridnorm_jax.training.task_model import TaskModel

# Sums of up to 400 log-probabilities of about 6 in float32, whose layers torch computes in another order.
TOLERANCE = 1e-4


class Recorder:
    """Notes down what is asked, and what is answered, by the kind of request."""

    def __init__(self, model, monkeypatch):
        self.answers = {}
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            monkeypatch.setattr(model, kind, self._noting(kind, getattr(model, kind)))

    def _noting(self, kind, ask):
        def noting(requests):
            answers = ask(requests)
            self.answers[kind] = [(request.args, answer) for request, answer in zip(requests, answers, strict=True)]
            return answers

        return noting


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return run_config(path)


@pytest.fixture(scope="module")
def params(config):
    return parameters(config)


@pytest.fixture(scope="module")
def in_tasks():
    """Paths of data in task files are relative to where the program is started."""
    before = os.getcwd()
    os.chdir(TASKS)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def ours(config, in_tasks):
    return TaskModel(one_device_program(config), load_tokenizer(config.data), ["."], key="--tasks")


@pytest.fixture(scope="module")
def theirs(config, params, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("hf") / "model"
    write_huggingface(folder, config, params)
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)


def test_every_request_and_every_metric_are_those_of_the_harness(ours, theirs, params, monkeypatch):
    model = ours.for_lm_eval(params)
    mine, other = Recorder(model, monkeypatch), Recorder(theirs, monkeypatch)
    tasks = open_tasks(["."], key="--tasks", window=WINDOW)
    scores, expected = evaluate_tasks(model, tasks), evaluate_tasks(theirs, tasks)

    assert set(mine.answers) == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    for kind, pairs in other.answers.items():
        assert [asked for asked, _ in mine.answers[kind]] == [asked for asked, _ in pairs]
    for (_, our), (asked, their) in zip(mine.answers["loglikelihood"], other.answers["loglikelihood"], strict=True):
        assert our[0] == pytest.approx(their[0], abs=TOLERANCE), asked
        assert our[1] == their[1], asked
    rolling = [[answer for _, answer in recorder.answers["loglikelihood_rolling"]] for recorder in (mine, other)]
    np.testing.assert_allclose(*rolling, atol=TOLERANCE)
    assert mine.answers["generate_until"] == other.answers["generate_until"]
    assert scores.keys() == expected.keys() == {"local_colours", "local_pages", "local_counting"}
    for name, score in scores.items():
        assert score.metrics == pytest.approx(expected[name].metrics, rel=1e-6)
        assert score.errors == pytest.approx(expected[name].errors, rel=1e-6)
        assert score.samples == expected[name].samples == {"local_colours": 5}.get(name, 3)
