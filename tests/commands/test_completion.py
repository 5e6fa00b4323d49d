"""The completion scripts, in the shells that are installed, and what the program proposes to them."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridnorm_jax.commands import candidates as module
from hybridnorm_jax.commands.candidates import (
    CHOICES,
    OPTIONS_WITH_EQUALS,
    PATH_OPTIONS,
    TASKS_OPTION,
    VALUES_OF_OPTIONS,
    candidates,
)
from hybridnorm_jax.commands.completion import SCRIPTS, for_bash, split
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.commands.syntax import SYNTAX
from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS
from hybridnorm_jax.config.named_configurations import names
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
SECONDS = 30


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two runs, a YAML file and another file; `hybridnorm` is on PATH."""
    for directory in ("runs/one/checkpoints/000002", "runs/two=3/checkpoints", "notes", "bin"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes/other.txt").touch()
    program = tmp_path / "bin/hybridnorm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hybridnorm_jax "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_place_of_a_line_has_its_own_candidates(folder):
    assert candidates(["tr"]) == ["train "]
    assert candidates(["lab", "c"]) == ["compare ", "claims "]
    assert candidates(["schemes", "reord"]) == ["reordered "]
    assert candidates(["completion", ""]) == ["bash ", "zsh ", "fish "]
    assert candidates(["nothing", ""]) == []
    # Names of configurations, YAML files, directories, sections of keys.
    every = candidates(["train", ""])
    assert {f"{name} " for name in names()} < set(every)
    assert {"mine.yaml ", "notes/", "init_from=", *(f"{section}." for section in SECTIONS)} < set(every)
    assert candidates(["train", "notes/"]) == []
    assert candidates(["plan", "550"]) == ["550m "]
    # Keys, once the section is there; a map goes on with a dot.
    assert candidates(["train", "151m", "train.st"]) == ["train.steps=", "train.stall_seconds=", "train.stall_exit="]
    assert candidates(["train", "data.vali"]) == ["data.validation_fraction=", "data.validation."]
    # Values.
    assert candidates(["train", "model.scheme=span"]) == ["model.scheme=span "]
    assert candidates(["train", "data.segment_ids="]) == ["data.segment_ids=true ", "data.segment_ids=false "]
    assert candidates(["train", "model.attention_norm_bias=n"]) == ["model.attention_norm_bias=null "]
    assert candidates(["train", "init_from=runs/o"]) == ["init_from=runs/one/"]
    assert candidates(["train", "train.steps="]) == []
    # Options.
    assert candidates(["train", "--"]) == ["--help ", "--dry-run "]
    assert candidates(["lab", "compare", "--emit-jobs=s"]) == ["--emit-jobs=slurm "]
    assert candidates(["convert", "runs/one", "out", "--form", ""]) == ["pre_rmsnorm ", "pre_crmsnorm "]
    assert candidates(["convert", "runs/one", "out", "--text", "notes/o"]) == ["notes/other.txt "]
    assert candidates(["convert", "runs/one", "out", "--pad-to", ""]) == []


def test_eval_gets_run_directories_first_and_then_keys(folder):
    assert candidates(["eval", "runs/"]) == ["runs/one ", "runs/two=3 "]
    assert candidates(["eval", ""]) == ["bin/", "notes/", "runs/", "runs/one ", "runs/two=3 "]
    assert candidates(["eval", "runs/one/checkpoints/"]) == ["runs/one/checkpoints/000002/"]
    assert candidates(["eval", "runs/one", "eval.batch"]) == ["eval.batches=", "eval.batch_size="]


def test_tasks_are_names_and_files_one_after_the_other(folder):
    assert candidates(["eval", "runs/one", "--t"]) == ["--tasks "]
    assert candidates(["eval", "runs/one", "--tasks", "hel"]) == ["hellaswag "]
    assert candidates(["eval", "runs/one", "--tasks", "piqa,arc"]) == ["piqa,arc_challenge ", "piqa,arc_easy "]
    assert candidates(["eval", "runs/one", "--tasks", "m"]) == ["mine.yaml "]
    assert {"hybridnorm ", "notes/", "mine.yaml "} < set(candidates(["eval", "runs/one", "--tasks", ""]))
    assert candidates(["eval", "runs/one", "--limit", ""]) == []


def test_the_labs_own_keys_are_only_the_labs(folder):
    assert candidates(["lab", "compare", "se"]) == ["seeds="]
    assert candidates(["lab", "signal", "schemes=[pre,peri,spa"]) == ["schemes=[pre,peri,span"]
    assert candidates(["lab", "signal", "schemes="])[:2] == ["schemes=[pre", "schemes=[post"]
    assert candidates(["lab", "report", "runs", "baseline=spa"]) == ["baseline=span "]
    assert candidates(["train", "sch"]) == []


def test_plugins_are_proposed_wherever_a_run_is_read(folder):
    (folder / "mine.py").touch()
    for command in (["lab", "report", "runs"], ["convert", "runs/one", "out"], ["eval", "runs/one"], ["train"]):
        assert candidates([*command, "run.plugins=[m"]) == ["run.plugins=[mine.py"]
        assert candidates([*command, "run.plugins=[a.py,m"]) == ["run.plugins=[a.py,mine.py"]


def test_train_has_no_keys_of_the_lab(folder):
    assert candidates(["train", "schemes=[p"]) == []


def test_the_words_of_a_key_are_those_that_it_takes():
    """Each word is accepted, whatever else is then missing; and no key with a few words is left out."""

    def error_of(path, value):
        section, _, name = path.rpartition(".")
        try:
            kind = SECTIONS[section] if section else RunConfig
            kind(**{name: value})
        except ConfigError as error:
            return str(error)
        return ""

    for path, choices in CHOICES.items():
        if path in FIELDS:
            for choice in choices:
                assert f"{path}={choice}: not known" not in error_of(path, choice)
    texts = [path for path, field in FIELDS.items() if field.type is str]
    of_a_few_words = {path for path in texts if f"{path}=nonsense: not known" in error_of(path, "nonsense")}
    assert of_a_few_words == set(CHOICES) & set(FIELDS)


def test_every_option_has_its_values_named():
    options = {option for syntax in SYNTAX.values() for option in syntax.options}
    alone = {"--dry-run", "--json", "--plain", "--speed", "--search", "--drop-duplicates"}
    assert options == {*alone, *VALUES_OF_OPTIONS, *PATH_OPTIONS, *OPTIONS_WITH_EQUALS, TASKS_OPTION}


def test_what_bash_has_split_is_put_together_again(folder):
    assert for_bash("hybridnorm train model.scheme=spa", "spa") == ["span "]
    assert for_bash("hybridnorm train model.scheme=", "")[:2] == ["pre ", "post "]
    assert for_bash("hybridnorm train model.sch", "model.sch") == ["model.scheme="]
    assert for_bash("hybridnorm eval runs/two=", "") == ["3 "]
    (folder / "my file.yaml").touch()
    assert for_bash("hybridnorm train my", "my") == [r"my\ file.yaml "]
    assert for_bash("hybridnorm train 'my", "my") == ["my file.yaml "]
    assert split("hybridnorm train ") == (["hybridnorm", "train", ""], False)
    assert split("hybridnorm train 'a b") == (["hybridnorm", "train", "a b"], True)


def test_an_answer_does_not_wait_for_jax(folder):
    code = "import sys; from hybridnorm_jax.commands.main import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    words = [sys.executable, "-c", code, "completion", "--arguments", "train", "model.scheme=spa"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["model.scheme=span ", "False"]


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"], ["--shell"], ["--line"], ["--arguments"]], ids=str)
def test_no_such_shell(words, capsys):
    assert main(["completion", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: completion")


def test_the_shells_are_those_of_the_scripts():
    assert tuple(SCRIPTS) == module.SHELLS


def _needs(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


def test_bash_calls_the_function_with_its_words(folder):
    _needs("bash")
    script = """
        source <(hybridnorm completion bash)
        COMP_LINE='hybridnorm train model.scheme=hybrid_st' COMP_POINT=${#COMP_LINE}
        COMP_WORDS=(hybridnorm train model.scheme = hybrid_st) COMP_CWORD=4
        _hybridnorm hybridnorm hybrid_st =
        printf '<%s>' "${COMPREPLY[@]}"
        complete -p hybridnorm
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "<hybrid_star >complete -o nospace -F _hybridnorm hybridnorm\n"
    assert done.stderr == ""


def test_fish_completes(folder):
    _needs("fish")
    lines = {
        "hybridnorm tr": ["train"],
        "hybridnorm lab ": ["claims", "compare", "report", "signal", "widths"],
        "hybridnorm train model.scheme=hybrid_st": ["model.scheme=hybrid_star"],
        "hybridnorm lab compare 'schemes=[pre,spa": ["schemes=[pre,span"],
        "hybridnorm eval runs/": ["runs/one", "runs/two=3"],
        "hybridnorm train 55": ["550m"],
        f"{folder}/bin/hybridnorm tr": ["train"],
    }
    script = "hybridnorm completion fish | source\n"
    for line in lines:
        script += f'complete -C "{line}"; echo ==\n'
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    found = [answer.split("\n")[:-1] for answer in done.stdout.removesuffix("==\n").split("==\n")]
    assert found == list(lines.values())


class Terminal:
    """An interactive shell, which reads keys and shows a line."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.file, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {"TERM": "dumb"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def type(self, keys: str, expected: str) -> None:
        """Press keys, and wait until the terminal shows what is expected."""
        os.write(self.file, keys.encode())
        end, seen = time.monotonic() + SECONDS, ""
        while expected not in seen:
            readable, _, _ = select.select([self.file], [], [], max(0, end - time.monotonic()))
            assert readable, f"{expected!r} is not in {seen!r}"
            seen += os.read(self.file, 65536).decode(errors="replace")

    def close(self) -> None:
        """End the shell."""
        self.process.kill()
        self.process.wait()
        os.close(self.file)


@pytest.fixture(params=["bash", "zsh"])
def shell(request, folder):
    """A terminal in which `hybridnorm` is completed."""
    _needs(request.param)
    if request.param == "bash":
        terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], {"PS1": "> "})
        setup = "source <(hybridnorm completion bash)"
    else:
        (folder / "zfunc").mkdir()
        script = subprocess.run(["hybridnorm", "completion", "zsh"], capture_output=True, check=True).stdout
        (folder / "zfunc/_hybridnorm").write_bytes(script)
        terminal = Terminal(["zsh", "-f", "-i"], {"PS1": "> "})
        setup = f"fpath+={folder}/zfunc; autoload -U compinit; compinit -D -u"
    terminal.type(f"{setup}; echo re''ady\n", "ready\r\n")
    yield terminal
    terminal.close()


def test_a_tabulator_completes_the_line(shell, folder):
    clear = "\x15"
    shell.type("hybridnorm conv\t", "hybridnorm convert ")
    shell.type(f"{clear}hybridnorm lab co\t", "lab compare ")
    shell.type(f"{clear}hybridnorm train model.sch\thybrid_st\t", "train model.scheme=hybrid_star ")
    shell.type(f"{clear}hybridnorm eval runs/two=\t", "eval runs/two=3 ")
    shell.type(f"{clear}hybridnorm lab compare 'schemes=[pre,spa\t", "'schemes=[pre,span")
    shell.type(f"{clear}{folder}/bin/hybridnorm train min\t", "hybridnorm train mine.yaml ")


def test_runs_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    assert candidates(["runs", ""]) == ["compare ", "runs/"]
    assert candidates(["runs", "compare", "runs/"]) == ["runs/mine "]
    assert candidates(["runs", "compare", "runs/mine", "runs/"]) == ["runs/mine "]
    assert "loss " in candidates(["runs", "--sort", ""])
