"""`hybridnorm eval RUN --tasks ...`: what it prints, and what it refuses in one line."""

import dataclasses
import json
import os
import re
import sys

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from processes import run_together
from task_models import TASKS, parameters, run_config, write_tokenizer

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.evaluation.paper_tasks import PAPER_TASKS
from hybridnorm_jax.evaluation.tasks import TaskScore, paper_average, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def fresh(folder):
    """The directory of a run that nobody asks for answers."""
    config = run_config(folder / "tokenizer.json")
    params = jax.jit(hn.Decoder(config.model).init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    hn.save_run(str(folder / "fresh"), config, params, tokenizer_file=folder / "tokenizer.json")
    return str(folder / "fresh")


@pytest.fixture(scope="module")
def run(folder):
    """The directory of a run of `hybrid_star` that has learned the tasks, saved with its tokenizer."""
    _with_lm_eval()  # without which nobody needs it
    config = run_config(folder / "tokenizer.json", scheme="hybrid_star")
    hn.save_run(str(folder / "saved"), config, parameters(config), tokenizer_file=folder / "tokenizer.json")
    return str(folder / "saved")


@pytest.fixture(autouse=True)
def _in_tasks(monkeypatch):
    """Paths of data in task files are relative to where the program is started."""
    monkeypatch.chdir(TASKS)


def _printed(capsys, *words):
    assert main(["eval", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def _error(capsys, *words):
    assert main(["eval", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line.removeprefix("error: ")


def _with_lm_eval():
    pytest.importorskip("lm_eval")


def test_a_table_or_json_and_the_same_numbers_in_both(run, capsys):
    _with_lm_eval()
    text = _printed(capsys, run, "--tasks", ".")
    printed = _printed(capsys, run, "--tasks=colours.yaml,pages.yaml,counting.yaml", "--json")
    result = json.loads(printed)
    assert result["checkpoint"] == f"{run}/checkpoints/000000"
    assert result["limit"] is None
    assert result["tasks"].keys() == {"local_colours", "local_pages", "local_counting"}
    assert result["tasks"]["local_colours"].keys() == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "samples"}
    rows = [re.split(r"  +", line) for line in text.splitlines()]
    assert rows[0] == [f"{run}/checkpoints/000000: tasks"]
    assert rows[1] == ["task", "metric", "value", "stderr", "samples"]
    for name, metric, value, error, samples in rows[2:]:
        score = result["tasks"][name]
        assert f"{score[metric]:.4f}" == value
        assert error == (f"{score[f'{metric}_stderr']:.4f}" if f"{metric}_stderr" in score else "-")
        assert int(samples) == score["samples"]
    assert len(rows[2:]) == 6


def test_a_limit_is_the_first_documents(run, capsys):
    _with_lm_eval()
    result = json.loads(_printed(capsys, run, "--tasks", "colours.yaml", "--limit", "2", "--json"))
    assert result["tasks"]["local_colours"]["samples"] == result["limit"] == 2
    text = _printed(capsys, run, "--tasks", "colours.yaml", "--limit", "2")
    assert "at most the first 2 documents of each task" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "helaswag"], "--tasks: helaswag: no such task; did you mean 'hellaswag'?"),
        (["--tasks", "qqqqqq"], "--tasks: qqqqqq: no such task; `lm-eval ls tasks` lists those that there are"),
        (["--tasks", "nowhere/"], "--tasks: nowhere/: no such file or folder"),
        (["--tasks", "EMPTY"], "--tasks: EMPTY: has no file that ends in .yaml"),
        (["--tasks", "EMPTY/x.yaml"], "--tasks: EMPTY/x.yaml: no such file or folder"),
        (["--tasks", "BROKEN"], "--tasks: BROKEN/broken.yaml: cannot be read: "),
        (["--tasks", "OTHER"], "--tasks: OTHER: no file in it has the key `task` or `group`"),
        (["--tasks", "NODATA"], "--tasks: no_data: cannot be loaded: FileNotFoundError: "),
        (["--tasks", ","], "--tasks: names no task; give one, such as hellaswag, or a folder of task files"),
        (["--tasks", "long_answers.yaml"], "long_answers: max_gen_toks=256: must be below the 96 tokens that the mode"),
        (["--tasks", "odd_answers.yaml"], "odd_answers: generation_kwargs: num_beams: not known; known: "),
        (["--tasks", "odd_length.yaml"], "local_counting: generation_kwargs: max_gen_toks='many': must be an integer"),
        (["--tasks", "odd_stops.yaml"], "local_counting: generation_kwargs: until=7: must be a text, or a list of"),
        (["--tasks", "odd_metric.yaml"], "local_counting: metric exact_mach: is not one that the harness knows"),
        (["--tasks", "odd_mean.yaml"], "local_counting: metric exact_match: its aggregation is not one that the har"),
        (["--tasks", "many_shots.yaml"], "local_counting: cannot be asked: ValueError: Sample larger than population"),
    ],
    ids=str,
)
def test_what_is_no_task_ends_in_one_line(words, message, run, tmp_path, capsys, monkeypatch):
    _with_lm_eval()
    files = {
        "EMPTY/notes.txt": "",
        "BROKEN/broken.yaml": "task: [1",
        "OTHER/other.yaml": "model: {d_model: 32}",
        "NODATA/none.yaml": (TASKS / "colours.yaml").read_text().replace("local_colours", "no_data"),
        "counting.jsonl": (TASKS / "counting.jsonl").read_text(),
    }
    counting = (TASKS / "counting.yaml").read_text()
    files["long_answers.yaml"] = counting.replace("local_counting", "long_answers").replace("  max_gen_toks: 24\n", "")
    files["odd_length.yaml"] = counting.replace("max_gen_toks: 24", "max_gen_toks: many")
    files["odd_stops.yaml"] = re.sub("until:.*", "until: 7", counting)
    files["odd_metric.yaml"] = counting.replace("exact_match", "exact_mach")
    files["odd_mean.yaml"] = counting.replace("aggregation: mean", "aggregation: maen")
    files["many_shots.yaml"] = counting + "num_fewshot: 99\n"
    files["odd_answers.yaml"] = counting.replace("local_counting", "odd_answers").replace("do_sample", "num_beams")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert _error(capsys, run, *words).startswith(message)


def _lambada(folder):
    """A task whose metric the harness resamples for its standard error, and whose code prints."""
    colours = (TASKS / "colours.yaml").read_text().partition("output_type")[0].replace("local_colours", "words")
    keys = "output_type: loglikelihood\nvalidation_split: validation\ndoc_to_text: !function code.text\n"
    metric = "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    (folder / "code.py").write_text("def text(doc):\n    print('a line')\n    return doc['question']\n")
    (folder / "words.yaml").write_text(colours + keys + "doc_to_target: ' It is'\n" + metric)
    (folder / "group.yaml").write_text("group: of_words\ntask: [words]\n")
    (folder / "colours.jsonl").write_bytes((TASKS / "colours.jsonl").read_bytes())


def test_nothing_but_json_is_printed_also_where_a_metric_is_resampled(run, tmp_path, capsys, monkeypatch):
    _with_lm_eval()
    _lambada(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", run, "--tasks", "group.yaml", "--json"]) == 0  # a group is found by its file, too
    printed = capsys.readouterr()
    scores = json.loads(printed.out)["tasks"]
    assert scores["words"]["perplexity_stderr"] > 0
    assert "of_words" in scores
    assert "a line" in printed.err
    assert "bootstrapping" not in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "3"], "--limit: needs --tasks; eval.batches scores the beginning of validation sets"),
        (["--tasks", ".", "--limit", "0"], "--limit 0: must be at least 1, the documents of each task to score"),
        (
            ["--tasks", ".", "--limit", "x"],
            "hybridnorm eval: argument --limit: invalid int value: 'x'; --help says more",
        ),
        (["--task", "."], "--task: no such option of `hybridnorm eval`; did you mean '--tasks'?"),
        (["eval.tasks=[piqa]"], "eval.tasks=[piqa]: a key of training; here it is --tasks"),
        (["eval.task_limit=3"], "eval.task_limit=3: a key of training; here it is --limit"),
    ],
    ids=str,
)
def test_options_that_cannot_be_end_in_one_line(words, message, fresh, capsys):
    assert _error(capsys, fresh, *words) == message


def test_without_the_harness(fresh, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    right = "--tasks: needs the extra `eval`: pip install 'hybridnorm-jax[eval]'"
    assert _error(capsys, fresh, "--tasks", "hellaswag") == right


def test_token_files_must_name_their_tokenizer(folder, capsys):
    _with_lm_eval()
    np.save(folder / "tokens.npy", np.arange(300, dtype=np.uint16))
    config = run_config(folder / "tokenizer.json")
    data = dataclasses.replace(config.data, source="tokens", files=(str(folder / "tokens.npy"),), tokenizer="bytes")
    unknown = dataclasses.replace(config, data=data)
    hn.save_run(str(folder / "unknown"), unknown, parameters(config, steps=1))
    right = "data.tokenizer names no tokenizer for these token files; name its tokenizer.json"
    assert _error(capsys, str(folder / "unknown"), "--tasks", "colours.yaml").endswith(right)


@pytest.mark.long
def test_several_processes_print_the_same_once(run, capsys):
    _with_lm_eval()
    expected = _printed(capsys, run, "--tasks", ".", "--json")
    # Sums over devices are taken in another order by gloo than inside one process.
    ended = run_together(2, [run, "--tasks", str(TASKS), "--json"], devices=4, seconds=300, script="eval.py")
    assert [status for status, _, _ in ended] == [0, 0], ended
    (_, first, _), (_, second, _) = ended
    found = json.loads(first[first.index("{") :])
    for name, score in json.loads(expected)["tasks"].items():
        assert found["tasks"][name] == pytest.approx(score, rel=1e-5)
    assert "{" not in second


def test_the_papers_eight_tasks_have_a_mean_of_their_own(run, capsys):
    _with_lm_eval()
    assert _error(capsys, run, "--tasks", "hybridnorm").startswith("--tasks: basic_arithmetic: cannot be loaded: ")
    scores = {
        name: TaskScore({metric: 0.1 * number, "other": 9.0}, {}, 5)
        for number, (name, metric) in enumerate(PAPER_TASKS.items())
    }
    assert paper_average(scores) == pytest.approx(0.35)
    assert table(scores).splitlines()[-1].split() == ["mean", "of", "hybridnorm", "0.3500"]
    scores.pop("copa")
    assert paper_average(scores) is None
    assert "mean" not in table(scores)
