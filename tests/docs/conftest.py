"""A directory in which the pages' examples run: with the files and runs that they name."""

import pytest
from pages import REPOSITORY, Block, blocks


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Makes an empty directory the current one; returns a function that puts a page's files there."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "docs", "launch", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for run in ("OUT_DIR", "runs/quickstart"):  # as `hybridnorm convert` and `hybridnorm train` leave them
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").symlink_to(REPOSITORY / "configs" / "quickstart.yaml")

    def write_files(page):
        for block in blocks(page):
            if block.file is not None:
                (tmp_path / block.file).write_text(block.text)
        return tmp_path

    return write_files


@pytest.fixture
def example_scheme():
    """Enters the scheme of CONTRIBUTING.md's example into the table, as if it had been written there."""
    from hybridnorm_jax.model import schemes_of_others

    block = scheme_block()
    exec(compile(block.text, str(block), "exec"), dict(vars(schemes_of_others)))


def scheme_block() -> Block:
    """The block of CONTRIBUTING.md that adds a scheme."""
    page = REPOSITORY / "CONTRIBUTING.md"
    (found,) = [block for block in blocks(page) if block.language == "python" and block.text.startswith("@scheme(")]
    return found
