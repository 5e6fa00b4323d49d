"""Every command that the pages show is one that the program takes, and what they show as its output is its output."""

import importlib
import re
import shlex
import tomllib

import pytest
from pages import PAGES, REPOSITORY, commands, inline_code, name

from hybridnorm_jax.commands import main as program
from hybridnorm_jax.config import resume_keys
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.old_keys import RENAMED, WANDB_SWITCH
from hybridnorm_jax.config.yaml_files import FIELDS, SECTIONS, gather

# test_clusters_page.py runs those of its page in a shell.
ALL = [command for page in PAGES if page.name != "clusters.md" for command in commands(page)]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
# Where each command has read its arguments and begins to work: "module.function".
WORK = {
    "eval": "commands.eval.evaluate_run",
    "convert": "commands.convert.convert",
    "export": "commands.export.export",
    "generate": "commands.generate.generate",
    "plan": "planning.compilation.plan",
    "tokenize": "commands.tokenize._tokenize",
    "tokenizer train": "commands.tokenizer._train",
    "data inspect": "commands.data._inspect",
    "lab signal": "lab.signal_at_start.random_batch",
    "lab widths": "lab.width_check.measure",
    "lab compare": "lab.compare.compare",
    "lab plan": "lab.expected_time.expected",
    "lab report": "lab.report.write_report",
    "lab claims": "lab.claims.run.measured",
    "runs": "commands.runs.list_runs",
    "runs compare": "commands.runs_compare.read_run",
}
QUICK = ("schemes", "completion")
FILE_ENDINGS = {"py", "md", "yaml", "safetensors"}
# Our package: a clone, the directory that one is in ("."), or a wheel; and its extras.
OUR_PACKAGE = re.compile(r"(?:\.|(?:\S*/)?hybridnorm[-_]jax(?:-([\d.]+)-py3-none-any\.whl)?)(?:\[([\w,-]+)\])?")
# Packages that pip installs besides our own.
OTHER_PACKAGES = {"libtpu", "jax[k8s]"}


class Reached(BaseException):
    """The command has taken its arguments."""


def test_the_pages_have_commands():
    assert len(ALL) > 50
    # Indented or with a prompt a command would be under no test.
    for page in PAGES:
        assert not re.search(r"^\s*\$ \w", page.read_text(), re.MULTILINE), (
            f"{name(page)}: commands stand in bash blocks"
        )


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_taken_as_it_stands(command, workplace, example_scheme, monkeypatch, capsys):
    workplace(command.block.page)
    words = list(command.words)
    if words[0] == "hybridnorm":
        check_program(words[1:], command.shown, monkeypatch, capsys)
    elif words[0] == "make":
        check_make(words[1:])
    elif words[0] == "pip" or words[:3] == ["python", "-m", "pip"]:
        check_pip(words[words.index("pip") + 1 :])
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif words[0] == "python":
        check_script(words[1], words[2:])
    else:
        assert words == [".", ".venv/bin/activate"], f"{command}: no check is known for this command"


def check_program(words, shown, monkeypatch, capsys):
    """The program takes these arguments; nothing is trained, compiled or written."""
    if "--help" in words or words[0] in QUICK:
        assert program.main(words) == 0
        printed = capsys.readouterr().out
        assert shown is None or printed == shown
        return
    if words[0] == "train":
        parse([word for word in words[1:] if word != "--dry-run"])
        return
    path = WORK.get(" ".join(words[:2])) or WORK[words[0]]
    if words[0] == "eval" and "--tasks" in words:
        path = "commands.eval_tasks.scores_of_run"
    if "--emit-jobs" in " ".join(words):
        path = "lab.jobs.emit"
    for option, way in (("--compare", "planning.stored_plans.plan_all"), ("--search", "planning.search.plan_all")):
        path = way if option in words else path
    module, _, function = path.rpartition(".")

    def reach(*arguments, **options):
        raise Reached

    monkeypatch.setattr(importlib.import_module(f"hybridnorm_jax.{module}"), function, reach)
    with pytest.raises(Reached):
        assert program.main(words) == 0, capsys.readouterr().err


def check_make(words):
    """The target exists, and what it hands to the program or to pytest is taken."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    (target,) = [word for word in words if "=" not in word]
    assert target in TARGETS
    assert set(settings) <= {"ARGS", "TESTS", "PYTHON", "WORKERS"}
    if target == "train":
        parse(shlex.split(settings.get("ARGS", "")))
    for test in settings.get("TESTS", "").split():
        assert (REPOSITORY / test).exists(), test


def check_pip(words):
    """Extras exist, and other packages are known ones."""
    assert words[0] == "install"
    packages = [word for word in words[1:] if not word.startswith("-")]
    for package in packages:
        ours = OUR_PACKAGE.fullmatch(package)
        if ours is None:
            assert package in OTHER_PACKAGES
            continue
        assert ours[1] in (None, PROJECT["project"]["version"])
        for extra in (ours[2] or "").split(","):
            assert not extra or extra in PROJECT["project"]["optional-dependencies"], extra


def check_module(module, words):
    """`python -m MODULE`: one of the tools that are installed, or a file of ours with these options."""
    if module == "build":
        return
    if module == "pytest":
        files = [word for word in words if word.startswith("tests/")]
        assert files
        assert all((REPOSITORY / file).is_file() for file in files), files
        return
    check_script(f"{module.replace('.', '/')}.py", words)


def check_script(script, words):
    """The file exists, reads the options that are given, and the keys exist."""
    text = (REPOSITORY / script).read_text()
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert f'"{option}"' in text, f"{script} has no {option}"
    gather([], [word for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)])
    for word in words:
        assert not word.endswith(".yaml") or (REPOSITORY / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_a_sentence_exist(page):
    """`hybridnorm train ...`, `make test` and keys such as `train.steps`, between backticks."""
    for code in inline_code(page):
        words = code.split()
        if words[0] == "hybridnorm" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in program.COMMANDS, code
        if words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS, code
        key = re.fullmatch(r"([a-z_]+)\.([a-z_]+)(?:=.*)?", code)
        if key and key[1] in SECTIONS and key[2] not in FILE_ENDINGS:
            assert f"{key[1]}.{key[2]}" in {*FIELDS, *RENAMED, WANDB_SWITCH}, code


def test_the_keys_that_may_change_on_resume_are_those_of_the_code():
    text = (REPOSITORY / "docs" / "training.md").read_text()
    (rows,) = re.findall(r"resume_keys\.py`\):\n\n\| key \| .*\n\|---\|---\|\n((?:\|.*\n)+)", text)
    cells = [row.split("|")[1] for row in rows.splitlines()]
    named = set(re.findall(r"`([\w.]+)`", "\n".join(cells)))
    sections = {name for cell in cells if cell.startswith(" all of ") for name in re.findall(r"`([\w.]+)`", cell)}
    assert {f"{section}." for section in sections} == set(resume_keys.FREE_SECTIONS)
    assert named - sections == resume_keys.FREE_KEYS | set(resume_keys.PLACES_OF_DATA)
