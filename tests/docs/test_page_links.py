"""Every link inside the project leads somewhere, and every file and name that a page mentions is there."""

import importlib.util
import re

import pytest
from pages import PAGES, REPOSITORY, anchors, inline_code, links, name

import hybridnorm_jax as hn

PACKAGE = REPOSITORY / "hybridnorm_jax"
API = REPOSITORY / "docs" / "api.md"
CHANGELOG = REPOSITORY / "CHANGELOG.md"
# A path that begins with one of these is meant to be in the repository; metrics such as `train/loss` are not.
FOLDERS = ("tests/", "examples/", "docs/", "configs/", "launch/", "benchmarks/", "hybridnorm_jax/", ".ci/", ".github/")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_inside_the_project_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    """`tests/model/test_block.py`, `training/step.py` (in the package), `launch/`, between backticks."""
    for code in inline_code(page):
        if code.startswith(FOLDERS):
            assert (REPOSITORY / code).exists(), f"{code}: no such file"
        elif re.fullmatch(r"[\w/]+/\w+\.py", code):
            assert (PACKAGE / code).is_file(), f"{code}: no such file in the package"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_the_package_exist(page):
    """`hn.load_run` and `hybridnorm_jax.training.optimizer`, between backticks; the changelog also has old ones."""
    for code in inline_code(page) if name(page) != "CHANGELOG.md" else ():
        found = re.match(r"(hn|hybridnorm_jax)((?:\.\w+)+)", code)
        if not found:
            continue
        place = hn
        for number, part in enumerate(parts := found[2].strip(".").split(".")):
            if not hasattr(place, part):
                importlib.import_module(f"hybridnorm_jax.{'.'.join(parts[: number + 1])}")
            place = getattr(place, part)


def test_the_changelog_names_modules_that_exist():
    """Its table of what was moved: the right column, where `.name` stands in the package of the module before it."""
    rows = re.findall(r"^\| (.*hybridnorm_jax.*) \| (.*hybridnorm_jax.*) \|$", CHANGELOG.read_text(), re.MULTILINE)
    assert len(rows) > 20
    for _, now in rows:
        parent = ""
        for code in re.findall(r"`([\w.]+)`", now):
            module = f"{parent}{code}" if code.startswith(".") else code
            parent = module.rpartition(".")[0]
            assert importlib.util.find_spec(module) is not None, module


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)$", API.read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    modules = {"equivalence", "nnx"}
    public = {f"hybridnorm_jax.{public}" for public in set(hn.__all__) - modules}
    public |= {f"hybridnorm_jax.equivalence.{public}" for public in hn.equivalence.__all__}
    assert set(shown) == public | {"hybridnorm_jax.nnx"}
    (members,) = re.findall(r"members: \[(.*)\]", API.read_text())
    assert set(members.split(", ")) == set(hn.nnx.__all__)


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 200


def test_every_page_is_in_the_index_and_in_the_menu():
    menu = (REPOSITORY / "mkdocs.yml").read_text()
    index = REPOSITORY / "docs" / "index.md"
    linked = {link.partition("#")[0] for link in links(index)}
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f" {page.name}" in menu, page.name
        assert page == index or page.name in linked, page.name
