"""Plants a fault in a copy of the package, and runs tests there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from planted_faults.fault import Fault

REPOSITORY = Path(__file__).parents[2]
# What the tests read besides the package; links to it are enough.
BESIDES = ("tests", "configs", "docs", "pyproject.toml", "train.py", "eval.py", "README.md")


def plant(fault: Fault, directory: Path) -> None:
    """Make `directory` a checkout whose package has the fault.

    Raises:
      LookupError: the source that the fault replaces is not there exactly once.
    """
    shutil.copytree(
        REPOSITORY / "hybridnorm_jax",
        directory / "hybridnorm_jax",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in BESIDES:
        (directory / name).symlink_to(REPOSITORY / name)
    file = directory / "hybridnorm_jax" / fault.file
    file.write_text(with_fault(fault, file.read_text()))


def with_fault(fault: Fault, source: str) -> str:
    """The source of the fault's file, with the fault.

    Raises:
      LookupError: the source that the fault replaces is not there exactly once.
    """
    count = source.count(fault.right)
    if count != 1:
        raise LookupError(f"{fault.name}: {fault.file} holds what it replaces {count} times, instead of once")
    return source.replace(fault.right, fault.wrong)


def first_failure(fault: Fault, directory: Path) -> str | None:
    """The first of the fault's tests that fails where it is planted; None: all pass.

    Raises:
      RuntimeError: the tests could not be run.
    """
    tests = [str(Path("tests") / name) for name in fault.tests]
    # With those that `make test` leaves out: some faults are found by long tests alone.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = os.environ | {
        "PYTHONPATH": str(directory),
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
    }
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"{fault.name}: pytest ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return failed[0].removeprefix("FAILED ").partition(" - ")[0]
