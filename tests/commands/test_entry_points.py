"""The program as a user meets it: help, and wrong inputs that end in one line and status 2."""

import dataclasses
import errno
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from hybridnorm_jax.commands.main import COMMANDS, exit_status, main
from hybridnorm_jax.commands.syntax import OF_ONE_RUN, SYNTAX
from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.lab.compare_options import CompareOptions
from hybridnorm_jax.lab.signal_at_start import SignalOptions
from hybridnorm_jax.lab.width_check import WidthOptions

REPOSITORY = Path(__file__).parents[2]
TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"),
    *("train.steps=2", "train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0"),
]


@pytest.fixture
def tokens_file(tmp_path):
    """A token file of 400 ids below 257."""
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16))
    return path


def _train(tmp_path, *words):
    return main(["train", f"run.dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", *TINY, *words])


def _one_line(capsys):
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.shceme=span"], r"model\.shceme=span: no such key; did you mean 'model\.scheme'\?"),
        (["train.steps=many"], "train.steps=many: expected an integer"),
        (["model.num_heads=5"], "model.num_heads=5: must divide model.d_model=16"),
        (["mesh.data=3"], "must multiply to the 8 devices there are"),
        (
            ["train.batch_size=9"],
            "train.batch_size / train.grad_accumulation: 9 sequences at a time, must be a multiple",
        ),
        (["model.attention=cudnn"], "model.attention=cudnn: needs platform gpu, this is cpu"),
        (
            ["model.positions=learned", "model.max_positions=4"],
            "train.seq_len=8: must be at most model.max_positions=4",
        ),
        (["missing.yaml"], "missing.yaml: cannot be read"),
        (["run.wandb=true"], "run.loggers=wandb: needs the extra `wandb`: pip install 'hybridnorm-jax[wandb]'"),
        (["init_from=/nowhere"], "/nowhere: no such directory"),
        (["run.dir=/proc/nope"], "/proc/nope"),
        (["run.name=.."], "run.name=..: must be a plain directory name"),
        (["model.dtype=float64"], "model.dtype=float64: needs JAX_ENABLE_X64=1"),
        (["data.source=text"], "data.files=[]: data.source=text needs at least one file"),
        (["data.source=text", "data.files=[/nowhere/*.txt]"], "/nowhere/*.txt"),
        (["model.vocab_size=100"], "set model.vocab_size to at least 257"),
    ],
    ids=str,
)
def test_what_cannot_be_ends_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert _train(tmp_path, *words) == 2
    line = _one_line(capsys)
    assert message.replace("\\", "") in line


def test_bad_token_files_are_named(tmp_path, tokens_file, capsys):
    tokens = ["data.source=tokens", f"data.files=[{tokens_file}]", "data.validation_fraction=0"]
    assert _train(tmp_path, *tokens, "model.vocab_size=100") == 2
    line = _one_line(capsys)
    assert f"{tokens_file}: token " in line
    assert "outside model.vocab_size=100" in line
    assert _train(tmp_path, *tokens, "train.seq_len=500") == 2
    assert "a window needs 501 tokens, but there are 400" in _one_line(capsys)
    tokens_file.write_bytes(tokens_file.read_bytes()[:-10])
    assert _train(tmp_path, *tokens) == 2
    assert str(tokens_file) in _one_line(capsys)


def test_no_space_left_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "runs/x/config.yaml"))

    monkeypatch.setattr("hybridnorm_jax.training.loop.open_run_directory", full)
    assert _train(tmp_path) == 2
    assert "config.yaml: No space left on device" in _one_line(capsys)


def test_help_names_every_key_with_the_files_values(capsys):
    assert main(["train", str(REPOSITORY / "configs/151m.yaml"), "--help"]) == 0
    text = capsys.readouterr().out
    assert "model.vocab_size=100352" in text
    assert "configs/151m.yaml`." in text
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "model.vocab_size=50304" in text
    assert "`hybridnorm train 151m --help`" in text


def test_help_and_version_of_the_program(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 28
    for name in COMMANDS:
        assert [line for line in lines if line.startswith(f"  {name} ")]
    text = " ".join(lines)
    assert all(name in text for name in named_configurations.names())
    assert main([]) == 2
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridnorm {metadata.version('hybridnorm-jax')}\n"


HELPS = [[name] for name in COMMANDS]
HELPS += [["lab", name] for name in ("signal", "widths", "compare", "plan", "claims", "report")]
HELPS += [["runs", "compare"], []]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_every_help_has_at_most_80_columns_and_begins_with_the_usage(command, capsys):
    assert main([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"usage: hybridnorm {' '.join(command) or 'COMMAND'} ")
    assert max(len(line) for line in captured.out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "trian: no such command; did you mean 'train'?"),
        ("--verison", "--verison: no such option; did you mean '--version'?"),
        ("train 550", "550: no such configuration; did you mean '550m'?; a file is named FILE.yaml"),
        ("train 550 x=1", "550: no such configuration; did you mean '550m'?; a file is named FILE.yaml"),
        (
            "train configs/nowhere/quickstart.yaml",
            "configs/nowhere/quickstart.yaml: no such file; the configuration that comes with the package is named "
            "`quickstart`, without a path",
        ),
        (
            "train schemes=[pre]",
            "schemes=[pre]: a key of `hybridnorm lab signal`, `hybridnorm lab widths`, `hybridnorm lab compare` and "
            "`hybridnorm lab plan`, not of `hybridnorm train`; "
            "it takes model.scheme=...",
        ),
        (
            "train out=x",
            "out=x: a key of `hybridnorm lab signal`, `hybridnorm lab widths` and `hybridnorm lab claims`, not of "
            "`hybridnorm train`",
        ),
        (
            "train --json",
            "--json: an option of `hybridnorm eval`, `hybridnorm generate`, `hybridnorm plan`, `hybridnorm runs` and "
            "`hybridnorm runs compare`, not of "
            "`hybridnorm train`",
        ),
        ("train --topology=v5e:2x2", "--topology: an option of `hybridnorm plan`, not of `hybridnorm train`"),
        ("train --topology v5e:2x2", "--topology: an option of `hybridnorm plan`, not of `hybridnorm train`"),
        ("train --dry", "--dry: no such option of `hybridnorm train`; did you mean '--dry-run'?"),
        ("train --train.steps=3", "--train.steps=3: no such option of `hybridnorm train`; a key has no dashes"),
        ("train -x", "-x: no such option of `hybridnorm train`"),
        ("eval RUN --dry-run", "--dry-run: an option of `hybridnorm train`, not of `hybridnorm eval`"),
        ("eval RUN OTHER", "OTHER: eval takes one run directory, and then key=value only"),
        (
            "eval RUN seeds=[1]",
            "seeds=[1]: a key of `hybridnorm lab compare` and `hybridnorm lab plan`, not of",
        ),
        ("plan 151m --dry-run", "--dry-run: an option of `hybridnorm train`, not of `hybridnorm plan`"),
        ("plan 151m --topology", "hybridnorm plan: argument --topology: expected one argument; --help says more"),
        ("plan", "plan: name a configuration, such as 151m; --help says more"),
        ("plan FOLDER/mine.yaml", "mine.yaml: has no line such as `# Topology: v5p:4x4x4`; give --topology"),
        (
            "plan 151m schemes=[pre]",
            "schemes=[pre]: a key of `hybridnorm lab signal`, `hybridnorm lab widths`, `hybridnorm lab compare` and",
        ),
        ("convert A", "hybridnorm convert: the following arguments are required: OUT_DIR, --form; --help says more"),
        ("convert A B --form pre", "hybridnorm convert: argument --form: invalid choice: 'pre'"),
        ("convert A B --form pre_rmsnorm --pad-to x", "hybridnorm convert: argument --pad-to: invalid int value: 'x'"),
        ("convert A B --from pre_rmsnorm", "--from: no such option of `hybridnorm convert`; did you mean '--form'?"),
        ("convert A B train.steps=3", "train.steps=3: a key of `hybridnorm train`, not of `hybridnorm convert`"),
        ("convert A B C --form pre_rmsnorm", "hybridnorm convert: unrecognized arguments: C; --help says more"),
        ("lab", ""),
        ("lab singal", "lab singal: no such command; did you mean 'signal'?"),
        ("lab compare model.scheme=pre", "model.scheme=pre: schemes=[...] sets it here"),
        ("lab compare depths=[8]", "depths=[8]: a key of `hybridnorm lab signal`, not of `hybridnorm lab compare`; it"),
        ("lab compare --only", "--only: needs a value, --only=..."),
        ("lab compare --olny=1", "--olny=1: no such option of `hybridnorm lab compare`; did you mean '--only'?"),
        ("lab signal --emit-jobs=slurm", "--emit-jobs: an option of `hybridnorm lab compare`, not of"),
        ("lab report", "lab report: name one directory of runs, such as runs/compare-lab; --help says more"),
        ("lab report A train.steps=3", "train.steps=3: a key of `hybridnorm train`, not of `hybridnorm lab report`"),
        (
            "schemes --json",
            "--json: an option of `hybridnorm eval`, `hybridnorm generate`, `hybridnorm plan`, `hybridnorm runs` and "
            "`hybridnorm runs compare`, not of "
            "`hybridnorm schemes`",
        ),
        ("schemes 0", "0: a model has 1 to 10,000 blocks"),
        ("schemes pre \u0663", "\u0663: no such scheme"),  # an Arabic three is no depth
    ],
)
def test_what_was_not_meant_ends_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    folder = tmp_path.with_name(f"{tmp_path.name}-configurations")
    folder.mkdir()
    (folder / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("FOLDER", str(folder)).split()) == 2
    captured = capsys.readouterr()
    if message == "":  # without anything a command prints its help
        assert captured.out.startswith("usage: ")
        return
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_labs_own_keys_are_those_of_its_options():
    for command, options in (
        ("lab signal", SignalOptions),
        ("lab widths", WidthOptions),
        ("lab compare", CompareOptions),
    ):
        assert SYNTAX[command].keys == tuple(field.name for field in dataclasses.fields(options))
    assert {key for syntax in SYNTAX.values() for key in syntax.keys} >= set(OF_ONE_RUN)
    assert set(OF_ONE_RUN.values()) <= set(FIELDS)


def test_a_named_configuration_is_found_from_any_folder_and_a_path_stays_a_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "550m", "mesh.fsdp=-1", "--help"]) == 0
    assert "model.num_layers=16" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("model: {num_layers: 3}")
    assert main(["train", "550m", "mine.yaml", "--help"]) == 0
    assert "model.num_layers=3" in capsys.readouterr().out
    (tmp_path / "550m").write_text("model: {num_layers: 3}")
    assert main(["train", "550m", "--help"]) == 2
    assert "550m: a file here, and the name of a configuration; write ./550m" in _one_line(capsys)


WITHOUT_EXTRA = [
    (["run.wandb=true"], "wandb", "run.loggers=wandb", "wandb"),
    (["run.loggers=[csv, mlflow]"], "mlflow", "run.loggers=mlflow", "mlflow"),
    (["run.dir=gs://bucket/runs"], "gcsfs", "run.dir=gs://bucket/runs", "tpu"),
    (["data.source=text", "data.files=[gs://bucket/a.txt]"], "gcsfs", "gs:// files", "remote"),
    (["data.tokenizer=TOKENIZER"], "tokenizers", "data.tokenizer=TOKENIZER", "hf"),
]


@pytest.mark.parametrize(("words", "package", "asked", "extra"), WITHOUT_EXTRA, ids=str)
def test_train_without_an_extra_that_it_needs(words, package, asked, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    words = [word.replace("TOKENIZER", f"{tmp_path}/tokenizer.json") for word in words]
    assert _train(tmp_path, *words) == 2
    asked = asked.replace("TOKENIZER", f"{tmp_path}/tokenizer.json")
    assert _one_line(capsys) == f"error: {asked}: needs the extra `{extra}`: pip install 'hybridnorm-jax[{extra}]'"


@pytest.mark.parametrize(
    ("words", "package", "asked", "extra"),
    [
        ("eval gs://bucket/run", "gcsfs", "gs://bucket/run", "tpu"),
        ("convert GOLDENS/hf_gpt2 o --form pre_rmsnorm", "safetensors", "Hugging Face checkpoints", "hf"),
        ("plan 151m --topology v5e:2x2", "libtpu", "--topology v5e:2x2", "tpu"),
        ("lab signal depths=[1]", "matplotlib", "figures", "lab"),
    ],
)
def test_a_command_without_an_extra_that_it_needs(words, package, asked, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    assert main([word.replace("GOLDENS", f"{REPOSITORY}/tests/goldens") for word in words.split()]) == 2
    assert _one_line(capsys) == f"error: {asked}: needs the extra `{extra}`: pip install 'hybridnorm-jax[{extra}]'"


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [(["schemes"], ""), (["schemes"], "1"), (["--help"], ""), (["plan", "--help"], ""), (["train", "--help"], "")],
    ids=str,
)
def test_standard_output_that_nobody_reads_is_no_error(words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hybridnorm_jax", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd="/", env=environment, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error():
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        exit_status(command)


@pytest.mark.parametrize("words", [[], ["model.scheme=pre"], ["/nowhere"], ["--json"]], ids=str)
def test_eval_needs_a_run(words, capsys):
    assert main(["eval", *words]) == 2
    assert _one_line(capsys)


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one(config):
    files = ["data.files=[/data/x.npy]"] if "source: tokens" in config.read_text() else []
    for scheme in ("pre", "span", "qkvc_post"):
        parsed = parse([str(config), *files, f"model.scheme={scheme}"])
        assert parsed.model.scheme == scheme


@pytest.mark.long  # test_huge_pages.py starts one of them
def test_the_scripts_are_the_package(tmp_path):
    """The two files at the top run from anywhere and return the status."""
    for script, words in (("train.py", ["model.scheme=hybird"]), ("eval.py", [str(tmp_path)])):
        command = [sys.executable, str(REPOSITORY / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_schemes_print_as_tables(capsys):
    assert main(["schemes", "hybrid_star", "span", "3"]) == 0
    assert "layers 1-2" in capsys.readouterr().out
    assert main(["schemes", "hybird"]) == 2
    assert _one_line(capsys) == "error: hybird: no such scheme; did you mean 'hybrid'?"
