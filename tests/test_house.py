"""What the import contract and mypy, which `make lint` runs, cannot see or would not be asked about."""

import ast
import tomllib
from pathlib import Path

import pytest

import hybridnorm_jax as hn

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "hybridnorm_jax"


def _imports_the_root(source: str) -> list[int]:
    """The lines that import names from the root of the package, which gets them from any layer."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(each.name == "hybridnorm_jax" for each in names):
                lines.append(node.lineno)
            case ast.ImportFrom(module="hybridnorm_jax", level=0, names=names):
                # `from hybridnorm_jax import model` names a folder, and the contract sees it.
                if any(each.name in hn.__all__ for each in names):
                    lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import hybridnorm_jax as hn", [1]),
        ("def f():\n    from hybridnorm_jax import load_run", [2]),
        ("from hybridnorm_jax import model", []),
        ("from hybridnorm_jax.errors import UserError", []),
    ],
)
def test_an_import_of_the_root_is_seen(source, lines):
    assert _imports_the_root(source) == lines


def test_no_layer_reaches_up_through_the_public_names():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    reaching = {str(file.relative_to(REPOSITORY)): _imports_the_root(file.read_text()) for file in files}
    assert {file: lines for file, lines in reaching.items() if lines} == {}


def test_every_folder_is_a_package():
    """The contract and the wheel pass a folder over that has no __init__.py."""
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_mypy_checks_every_public_module():
    """Each module that __init__.pyi takes a name from is in mypy's list, or in a folder of the list."""
    checked = [
        Path(each) for each in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    ]
    missing = []
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body:
        module = "/".join((node.module or node.names[0].name).split("."))
        place = Path("hybridnorm_jax") / module
        place = place if (REPOSITORY / place).is_dir() else place.with_suffix(".py")
        if not any(place == each or each in place.parents or place in each.parents for each in checked):
            missing.append(str(place))
    assert missing == []
