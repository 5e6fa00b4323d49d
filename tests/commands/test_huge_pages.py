"""A process that computes on a CPU begins once more with huge pages, and is otherwise what it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from covering import others_are_long

from hybridnorm_jax.commands import huge_pages
from hybridnorm_jax.commands.huge_pages import KEPT_HEAP, TUNABLES, VARIABLE, WANTED, begin_again_with_huge_pages
from hybridnorm_jax.commands.main import main, start

REPOSITORY = Path(__file__).parents[2]
# Python runs this at every start: it notes down who started.
NOTE = """
import json, os, signal, sys
with open(os.environ["STARTS"], "a") as file:
    ignored = [int(number) for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN]
    tunables = os.environ.get("GLIBC_TUNABLES")
    print(json.dumps([os.getpid(), tunables, sys.orig_argv[1:], ignored]), file=file)
"""
on_this_system = pytest.mark.skipif(
    not (huge_pages._glibc_knows_it() and huge_pages._system_has_them()), reason="no glibc >= 2.35 with huge pages here"
)


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTE)
    others = (TUNABLES, VARIABLE, "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    paths = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))}
    return kept | paths | {"STARTS": str(tmp_path / "starts"), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}


def _starts(environment, *command, before=None):
    """(what the process noted at each start, its exit status, its output)."""
    run = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, preexec_fn=before
    )
    return [json.loads(line) for line in open(environment["STARTS"])], run


# Two processes each. The quick ones are a script, and a module with an option of Python in front.
ENTRIES = (
    ("train.py", "--help"),
    ("eval.py", "--help"),
    ("-m", "hybridnorm_jax", "train", "--help"),
    ("-X", "utf8", "-m", "hybridnorm_jax", "lab", "compare", "--help"),
    ("-X", "utf8", "-m", "hybridnorm_jax", "eval", "--help"),
    ("-c", "import sys; from hybridnorm_jax.commands.main import start; sys.exit(start())", "generate", "--help"),
    ("benchmarks/train_step.py", "--help"),
)


@on_this_system
@pytest.mark.parametrize("command", others_are_long(ENTRIES, (ENTRIES[0], ENTRIES[4])), ids=" ".join)
def test_every_entry_begins_twice_and_not_more(command, environment, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (first, second), run = _starts(environment, *command)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout
    assert (first[1], second[1]) == (None, WANTED)
    assert first[0] == second[0]  # the same process
    assert first[2] == second[2] == list(command)


@on_this_system
@pytest.mark.parametrize("command", ["schemes", "completion", "plan", "export"])
def test_what_does_not_compute_begins_once(command, environment):
    starts, _ = _starts(environment, "-m", "hybridnorm_jax", command, "--help")
    assert len(starts) == 1


@on_this_system
def test_signals_and_the_exit_status_are_as_they_were(environment):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background

    starts, run = _starts(environment, "-m", "hybridnorm_jax", "train", "no.such.key=1", before=ignore)
    assert [start[3] for start in starts] == [[signal.SIGINT, signal.SIGHUP]] * 2
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1


@pytest.mark.long  # the next test asks this of the function
@on_this_system
def test_other_tunables_are_kept(environment):
    given = "glibc.malloc.check=0:glibc.malloc.arena_max=3"
    starts, _ = _starts(environment | {TUNABLES: given}, "-m", "hybridnorm_jax", "eval", "--help")
    assert [start[1] for start in starts] == [given, f"{given}:{WANTED}"]


def test_where_programs_are_kept_the_heap_keeps_its_memory(tmp_path, monkeypatch):
    executed = _executed(monkeypatch)

    def tunables():
        begin_again_with_huge_pages()
        return executed.pop()[2][TUNABLES]

    kept = tmp_path / "kept"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(kept))
    assert tunables() == WANTED
    kept.mkdir()
    assert tunables() == WANTED
    (kept / "a_program").touch()
    assert tunables() == ":".join([WANTED, *KEPT_HEAP])
    given = "glibc.malloc.arena_max=3"
    monkeypatch.setenv(TUNABLES, given)
    threshold, trim, _ = KEPT_HEAP
    assert tunables() == f"{given}:{WANTED}:{threshold}:{trim}"


# Arrays of one size, one after the other, in a thread that is not the first; prints the page faults of the last ones.
LARGE_ARRAYS = """
import resource, sys, threading
import numpy as np

def fill(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(int(sys.argv[1]), np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    fill(1)
    print(fill(3))

thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


@on_this_system
def test_a_kept_heap_has_no_page_faults_but_those_of_the_largest_arrays(environment):
    def faults(size, *settings):
        command = [sys.executable, "-c", LARGE_ARRAYS, str(size)]
        tunables = {TUNABLES: ":".join(settings)}
        run = subprocess.run(command, env=environment | tunables, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults(200_000_000, WANTED) > 10
    assert faults(200_000_000, WANTED, *KEPT_HEAP) < 10
    assert faults(600_000_000, WANTED, *KEPT_HEAP) > 10


@pytest.mark.parametrize(
    "settings",
    [
        {VARIABLE: "0"},
        {TUNABLES: "glibc.malloc.hugetlb=0"},
        {TUNABLES: "glibc.malloc.hugetlb=2:glibc.malloc.check=0"},
        {"JAX_PLATFORMS": "tpu,cpu"},
        {"JAX_PLATFORMS": "cuda"},
    ],
    ids=str,
)
def test_the_user_or_another_platform_decides(settings, monkeypatch):
    executed = _executed(monkeypatch)
    for name in (VARIABLE, TUNABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    begin_again_with_huge_pages()
    assert executed == []


@pytest.mark.parametrize("installed", ["libtpu", "jax_plugins"])
def test_where_another_platform_is_installed_the_cpu_must_be_asked_for(installed, monkeypatch):
    executed = _executed(monkeypatch)
    monkeypatch.setattr(huge_pages.importlib.util, "find_spec", lambda name: object() if name == installed else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    begin_again_with_huge_pages()
    assert executed == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    begin_again_with_huge_pages()
    assert len(executed) == 1


def test_another_c_library_and_a_system_without_huge_pages_are_left_alone(tmp_path, monkeypatch):
    executed = _executed(monkeypatch)
    for version in ("glibc 2.34", "glibc 2.9", "musl 1.2", "", "glibc"):
        monkeypatch.setattr(os, "confstr", lambda name, version=version: version)
        begin_again_with_huge_pages()
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.41")
    for text in ("always madvise [never]\n", None):
        monkeypatch.setattr(huge_pages, "PAGES", tmp_path / "enabled")
        (tmp_path / "enabled").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "enabled").write_text(text)
        begin_again_with_huge_pages()
    assert executed == []


def test_a_system_that_refuses_changes_nothing(monkeypatch):
    _executed(monkeypatch)
    monkeypatch.setattr(os, "execve", lambda *_: (_ for _ in ()).throw(OSError("Argument list too long")))
    begin_again_with_huge_pages()


def test_as_a_function_the_program_never_begins_again(monkeypatch, capsys):
    executed = _executed(monkeypatch)
    assert main(["train", "--help"]) == 0
    assert executed == []
    assert start(["schemes", "--help"]) == 0
    assert executed == []
    assert start(["train", "--help"]) == 0  # as here nothing is executed
    assert len(executed) == 1


def _executed(monkeypatch):
    """Notes down what would be executed, on a system where it would be."""
    executed = []
    monkeypatch.setattr(os, "execve", lambda *arguments: executed.append(arguments))
    for name in (VARIABLE, TUNABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.41")
    monkeypatch.setattr(huge_pages, "PAGES", REPOSITORY / "LICENSE")  # a text without [never]
    return executed
