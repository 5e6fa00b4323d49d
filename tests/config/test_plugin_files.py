"""Which files a plugin is compared by: what it imports from its own package, or from beside it, is part of it."""

import pytest

from hybridnorm_jax.config import plugin_files
from hybridnorm_jax.config.plugins import plugins_of
from hybridnorm_jax.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of a folder that Python imports from."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(path, text=""):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return str(file)

    return write


def _digest(name):
    (plugin,) = plugins_of([name])
    return plugin.digest


@pytest.mark.parametrize("initialized", [True, False])
def test_a_module_of_a_package_is_compared_with_all_of_the_package(initialized, write):
    if initialized:
        write("its_package/__init__.py")
    write("its_package/schemes.py", "from its_package.rules.rule import SCALE")
    write("its_package/rules/rule.py", "SCALE = 1.5")
    before = _digest("its_package.schemes")
    write("its_package/data.txt", "no source")
    assert _digest("its_package.schemes") == before
    write("its_package/rules/rule.py", "SCALE = 9.0")
    assert _digest("its_package.schemes") != before


def test_of_a_package_in_two_folders_the_module_that_python_takes_is_compared(write, tmp_path, monkeypatch):
    write("first/its_package/schemes.py", "SCALE = 1.5")
    write("second/its_package/schemes.py", "SCALE = 9.0")
    write("second/its_package/other.py", "")
    for folder in ("second", "first"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert plugin_files.contents("its_package.schemes") == {"schemes.py": b"SCALE = 1.5", "other.py": b""}


def test_what_a_run_keeps_in_a_package_is_no_part_of_it(write):
    write("its_package/schemes.py")
    before = _digest("its_package.schemes")
    write("its_package/runs/one/config.yaml")
    write("its_package/runs/one/plugins/abc/schemes.py")
    write("its_package/.venv/lib/other.py")
    assert _digest("its_package.schemes") == before


def test_links_to_directories_are_not_followed(write, tmp_path):
    write("its_package/schemes.py")
    write("elsewhere/other.py")
    (tmp_path / "its_package/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "its_package/circle").symlink_to(tmp_path / "its_package")
    assert set(plugin_files.contents("its_package.schemes")) == {"schemes.py"}


def test_a_file_is_compared_with_what_it_imports_from_beside_it(write):
    plugin = write("mine.py", "import json\nimport its_rule\nfrom .nothing import x")
    write("its_rule.py", "from its_folder import scale")
    write("its_folder/scale.py", "import absent")
    write("not_imported.py")
    write("json.py", "import not_imported")
    found = set(plugin_files.contents(plugin))
    # Python finds json.py before its own json in this test.
    assert found == {"mine.py", "its_rule.py", "its_folder/scale.py", "json.py", "not_imported.py"}
    assert set(plugin_files.contents("mine")) == found


def test_what_python_finds_elsewhere_is_not_beside(write, tmp_path, monkeypatch):
    plugin = write("kept/mine.py", "import its_rule\nimport hybridnorm_jax")
    write("kept/its_rule.py", "SCALE = 1.5")
    write("kept/hybridnorm_jax/__init__.py")
    write("its_rule.py", "SCALE = 9.0")
    assert set(plugin_files.contents(plugin)) == {"mine.py"}
    monkeypatch.syspath_prepend(tmp_path / "kept")
    assert set(plugin_files.contents(plugin)) == {"mine.py", "its_rule.py"}


def test_absurd_sizes_are_refused(write, monkeypatch):
    write("its_package/schemes.py", "x = 1")
    write("its_package/other.py", "x = 2")
    monkeypatch.setattr(plugin_files, "MOST_ENTRIES", 1)
    with pytest.raises(ConfigError, match=r"its_package\.schemes cannot be read: OSError: .*more than 1 files"):
        plugins_of(["its_package.schemes"])
