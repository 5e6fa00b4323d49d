"""Runs cases in copies of one process that has imported the program."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.malformed.case import SECONDS, Case, Outcome
from tests.malformed.templates import make_templates

REPOSITORY = Path(__file__).resolve().parents[2]


class Runner:
    """A zygote (zygote.py), and the directories that cases start from; a context manager."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="malformed-"))
        self._templates = self._directory / "templates"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "HOME": str(self._directory),
            "PYTHONPATH": str(REPOSITORY),
        }
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.malformed.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        make_templates(self._templates, case=self._directory / "case")

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._zygote.stdin.close()
        self._zygote.wait()
        self._zygote.stdout.close()
        shutil.rmtree(self._directory)

    def run(self, cases: Iterable[Case]) -> Iterator[tuple[Case, Outcome]]:
        """Each case with how it ended."""
        for case in cases:
            cwd = self._directory / "case"
            shutil.copytree(self._templates / case.base, cwd)
            try:
                _prepare(case, cwd)
                before = _contents(cwd)
                # A little later than what counts as hung.
                asked = {"cwd": str(cwd), "arguments": case.arguments, "seconds": SECONDS + 1}
                # It makes devices of its own.
                asked["devices"] = case.arguments[:1] != ("plan",)
                print(json.dumps(asked), file=self._zygote.stdin, flush=True)
                answer = self._answer()
                after = _contents(cwd)
            finally:
                shutil.rmtree(cwd)
            written = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
            yield case, Outcome(**answer, written=tuple(written))

    def _answer(self) -> dict:
        line = self._zygote.stdout.readline()
        if not line:
            raise RuntimeError("the process that is copied for each case has ended")
        return json.loads(line)


def _prepare(case: Case, cwd: Path) -> None:
    for name, content in case.files.items():
        file = cwd / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if case.prepare is not None:
        case.prepare(cwd)


def _contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Path -> size and time of change of every file; a cache may be written."""
    found = {}
    for file in directory.rglob("*"):
        path = str(file.relative_to(directory))
        if not path.startswith("cache") and "__pycache__" not in path and not file.is_dir():
            status = file.lstat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found
