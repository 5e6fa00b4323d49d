"""The harness gets the same from our model as from its own `hf` model with the same weights, request by request."""

import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from task_models import (
    TASKS,
    WINDOW,
    one_device_program,
    parameters,
    run_config,
    texts,
    write_huggingface,
    write_tokenizer,
)

from hybridnorm_jax.data.tokens.tokenizers import load_tokenizer
from hybridnorm_jax.evaluation.tasks import evaluate_tasks, open_tasks
from hybridnorm_jax.training.task_model import TaskModel

# Sums of up to 440 nats in float32, whose layers torch computes in another order; measured: 3e-5 at most.
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
    # Its cache of logits (0.4.13) scores "." after "so on" by the logits of " so" where the same text is also asked for
    # as another context and " so on.".
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, logits_cache=False)


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
    # The model gets some right and some wrong.
    assert scores["local_colours"].metrics["acc"] == pytest.approx(5 / 6)
    assert scores["local_counting"].metrics["exact_match"] == pytest.approx(2 / 3)
    assert scores.keys() == expected.keys() == {"local_colours", "local_pages", "local_counting"}
    for name, score in scores.items():
        assert score.metrics == pytest.approx(expected[name].metrics, rel=1e-6)
        assert score.errors == pytest.approx(expected[name].errors, rel=1e-6)
        assert score.samples == expected[name].samples == {"local_colours": 6}.get(name, 3)


def test_examples_are_the_same_each_time_a_task_is_scored(ours, params, tmp_path, monkeypatch):
    """Or two steps of one run would be scored with different questions, and neither as the harness does."""
    file = tmp_path / "shots.yaml"
    file.write_text((TASKS / "colours.yaml").read_text() + "num_fewshot: 2\n")
    tasks, asked = open_tasks([str(file)], key="--tasks", window=WINDOW), []
    for _ in range(2):
        model = ours.for_lm_eval(params)
        recorder = Recorder(model, monkeypatch)
        evaluate_tasks(model, tasks)
        asked.append([request for request, _ in recorder.answers["loglikelihood"]])
    assert len(asked[0]) > 10
    assert asked[0] == asked[1]


def _instances(kind, arguments):
    return [Instance(kind, {}, each, 0) for each in arguments]


def test_contexts_and_continuations_of_every_kind(ours, theirs, params):
    page = next(text for text in texts() if len(text) > 300)
    tokens = load_tokenizer(ours.config.data).encode
    exact = next(page[:end] for end in range(len(page)) if len(tokens(page[:end])) == WINDOW)
    requests = [
        ("", "What colour is grass?"),  # after the separator alone
        ("What colour is grass? It is ", "green"),  # the space moves
        ("What colour is grass? It is\n\t ", " green"),
        ("What colour is grass? It is", " green."),
        ("one two three", " four\nand so on."),  # greedy
        ("one two three four\nand so on", "."),
        ("one two thr", "ee four"),  # inside of a token
        (page, " And then"),  # a context longer than the window, of which the end is read
        (page[:250], page[250:]),
        ("The", exact[:-1]),
        (exact[:20], exact[20:]),
        ("", exact),  # a continuation as long as the window
        ("Straße", "n und Wege"),
    ]
    assert len(tokens(page)) > WINDOW
    mine = ours.for_lm_eval(params).loglikelihood(_instances("loglikelihood", requests))
    other = theirs.loglikelihood(_instances("loglikelihood", requests), disable_tqdm=True)
    for request, our, their in zip(requests, mine, other, strict=True):
        assert our[0] == pytest.approx(their[0], abs=TOLERANCE), request
        assert our[1] == their[1], request
    assert {is_greedy for _, is_greedy in mine} == {True, False}


def test_texts_of_every_length(ours, theirs, params):
    text = " ".join(texts())
    tokens = load_tokenizer(ours.config.data).encode(text)
    ends = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, len(tokens)]
    asked = [(load_tokenizer(ours.config.data).decode(tokens[:end]),) for end in ends]
    mine = ours.for_lm_eval(params).loglikelihood_rolling(_instances("loglikelihood_rolling", asked))
    other = theirs.loglikelihood_rolling(_instances("loglikelihood_rolling", asked), disable_tqdm=True)
    np.testing.assert_allclose(mine, other, atol=TOLERANCE)


def test_answers_end_where_they_are_asked_to(ours, theirs, params):
    model, page = ours.for_lm_eval(params), next(text for text in texts() if len(text) > 300)
    contexts = ["one two three", "What colour is", page, "a b c", "The lighthouse"]

    def both(options):
        asked = _instances("generate_until", [(context, dict(options)) for context in contexts])
        mine, other = model.generate_until(asked), theirs.generate_until(asked, disable_tqdm=True)
        assert mine == other, options
        return mine

    whole = both({"until": [], "max_gen_toks": 30})
    assert both({"max_gen_toks": 3}) == [_first_tokens(ours, text, 3) for text in whole]
    # A stop string that begins and ends inside of tokens, and one that never comes.
    stop = whole[4][5:9]
    pieces = [ours.tokenizer.decode([token]) for token in ours.tokenizer.encode(whole[4])]
    assert len(stop) == 4
    assert all(stop not in piece for piece in pieces)
    assert both({"until": ["never comes", stop], "max_gen_toks": 30})[4] == whole[4].partition(stop)[0]
    both({"until": "\n", "max_gen_toks": 30, "do_sample": False, "temperature": 0.0})


def _first_tokens(ours, text, count):
    return ours.tokenizer.decode(ours.tokenizer.encode(text)[:count])
