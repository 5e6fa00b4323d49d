"""The wheel: what it holds, and that it runs by itself, outside the checkout and without any extra."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "hybridnorm_jax"
# What the extras bring, by the names under which it is imported.
OF_EXTRAS = ("gcsfs", "libtpu", "matplotlib", "mlflow", "safetensors", "tokenizers", "torch", "transformers", "wandb")
TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "train.batch_size=8"),
    *("train.seq_len=8", "train.steps=1", "train.sample_tokens=0", "eval.batches=1"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads: setuptools leaves folders beside it, and finds those of earlier builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("configs", "hybridnorm_jax"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _build(source, out, *options):
    # Without isolation: this environment has what pyproject.toml asks for, and then nothing is downloaded.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source],
        env=_plain_environment(),
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """A wheel that is built from the sources."""
    out = tmp_path_factory.mktemp("wheel")
    _build(source, out, "--wheel")
    (file,) = out.glob("*.whl")
    return file


def _names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _plain_environment(**changes):
    """This process's, without what would lead Python to the checkout and without the tests' simulated devices."""
    left_out = ("PYTHON", "VIRTUAL_ENV", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"JAX_PLATFORMS": "cpu"} | changes


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for pattern in ("**/*.py", "**/*.pyi", "py.typed", "configs/*.yaml", "lab/claims/*.yaml")
        for path in PACKAGE.glob(pattern)
    }
    assert {"hybridnorm_jax/py.typed", "hybridnorm_jax/__init__.pyi", "hybridnorm_jax/configs/550m.yaml"} <= sources
    names = _names(wheel)
    assert {name for name in names if name.startswith("hybridnorm_jax/")} == sources
    others = {name.partition("/")[2] for name in names - sources}
    assert others == {"licenses/LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    assert [path.name for path in (PACKAGE / "configs").glob("*.yaml")]
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, re.MULTILINE))
    devices, data = {"tpu", "gpu", "plan-gpu"}, {"chat", "hf", "parquet", "remote", "tfrecord"}
    assert extras == devices | data | {"lab", "mlflow", "wandb", "peers", "eval", "dev", "docs"}


def test_a_wheel_from_the_source_distribution_holds_the_same_files(source, wheel, tmp_path):
    _build(source, tmp_path, "--sdist")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "LICENSE").is_file()
    _build(unpacked, tmp_path, "--wheel")
    (again,) = tmp_path.glob("*.whl")
    assert _names(again) == _names(wheel)
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        for name in _names(wheel):
            if name.startswith("hybridnorm_jax/"):
                assert one.read(name) == other.read(name), name


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment that has the wheel and, of this environment's packages, those of no extra.

    The dependencies are not installed anew, which takes half a minute: the new environment looks for them here, after
    its own packages. It does not find the hybridnorm_jax that is installed here: that is a .pth file, and .pth files
    count only in an environment's own directory. The tests assert whose hybridnorm_jax runs. What extras bring is
    hidden by modules that cannot be imported.
    """
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    python = directory / "bin/python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in OF_EXTRAS:
        hidden = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n'
        (packages / f"{name}.py").write_text(hidden)
    return directory


def _run(environment, folder, *words, check=True):
    return subprocess.run(
        [environment / "bin/hybridnorm", *words],
        cwd=folder,
        # The tokenized text is kept in the home directory.
        env=_plain_environment(HOME=str(folder)),
        capture_output=True,
        text=True,
        check=check,
    )


def _check_where_it_runs(environment):
    code = "import hybridnorm_jax as h, jax; print(h.__file__); print(h.Decoder.__name__)"
    done = subprocess.run(
        [environment / "bin/python", "-c", code],
        cwd="/",
        env=_plain_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    file, name = done.stdout.splitlines()
    assert Path(file).is_relative_to(environment)
    assert name == "Decoder"


@pytest.mark.long
def test_the_base_installation_is_enough(environment, tmp_path):
    """To import the library, for a quickstart, and to convert a run."""
    _check_where_it_runs(environment)
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert _run(environment, tmp_path, "--version").stdout == f"hybridnorm {version}\n"
    # The whole validation set would take most of the time.
    trained = _run(environment, tmp_path, "train", "quickstart", "train.steps=3", "eval.batches=2", "run.name=first")
    assert "perplexity" in trained.stdout
    assert (tmp_path / "runs/first/checkpoints/000003").is_dir()

    pre_ln = ["model.scheme=pre", "model.norm=layernorm", "model.norm_bias=true", "run.name=pre_ln"]
    _run(environment, tmp_path, "train", *TINY, *pre_ln)
    converted = _run(environment, tmp_path, "convert", "runs/pre_ln", "converted", "--form", "pre_crmsnorm")
    assert "Next: " in converted.stdout
    scores = _run(environment, tmp_path, "eval", "converted", "eval.batches=1", "--json").stdout
    assert json.loads(scores)["step"] == 1


@pytest.mark.long
def test_what_needs_an_extra_says_so_in_one_line(environment, tmp_path):
    hugging_face = REPOSITORY / "tests/goldens/hf_gpt2"
    (tmp_path / "tokenizer.json").write_text("{}")
    for words, extra in (
        (["convert", hugging_face, "out", "--form", "pre_rmsnorm"], "hf"),
        (["train", "data.tokenizer=tokenizer.json"], "hf"),
        (["lab", "signal", "depths=[1]"], "lab"),
    ):
        done = _run(environment, tmp_path, *words, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert line.endswith(f": needs the extra `{extra}`: pip install 'hybridnorm-jax[{extra}]'")


@pytest.mark.slow
def test_a_fresh_environment_with_everything_from_the_index(source, tmp_path):
    """The build in isolation, and the dependencies that pip itself chooses: needs a network and about a minute."""
    directory = tmp_path / "environment"
    venv.create(directory, with_pip=True, symlinks=True)
    subprocess.run(
        [directory / "bin/python", "-m", "pip", "install", "--quiet", source], env=_plain_environment(), check=True
    )
    _check_where_it_runs(directory)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "perplexity" in _run(directory, folder, "train", "quickstart", "train.steps=3").stdout
    assert (folder / "runs/quickstart-steps=3/checkpoints/000003").is_dir()
