"""Every Python block of the pages runs as it stands, from the first to the last of its page."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest
import yaml
from authors_models import case, part
from pages import PAGES, REPOSITORY, blocks, name

import hybridnorm_jax as hn
from hybridnorm_jax.config.key_lookup import flatten
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import gather

# tests/equivalence/test_foreign.py runs the first page and compares what it prints. test_contributing.py carries out
# the example of the second. A program writes the third, and another test compares it with what the library has.
ELSEWHERE = {"docs/foreign_models.md", "CONTRIBUTING.md", "docs/parameters.md"}
WITH_PYTHON = [
    page for page in PAGES if name(page) not in ELSEWHERE and any(block.language == "python" for block in blocks(page))
]


@pytest.fixture
def readers_files(workplace, tmp_path):
    """What the pages take for granted: a run that Hugging Face can express, and a GPT-2 checkpoint."""
    model = hn.ModelConfig(scheme="pre", d_model=32, num_layers=1, num_heads=2, vocab_size=257)
    params = jax.jit(hn.Decoder(model).init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    hn.save_run("runs/my_run", dataclasses.replace(RunConfig(), model=model), params)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "gpt2").symlink_to(REPOSITORY / "tests" / "goldens" / "hf_gpt2")
    return workplace


@pytest.fixture
def fairseqs_checkpoint(readers_files, tmp_path):
    """A file as fairseq's trainer saves one: arguments, and names that begin with `decoder.`."""
    torch = pytest.importorskip("torch")
    golden = part(case("normformer_resid")[2], "param/")
    state = {f"decoder.{name}": torch.from_numpy(array) for name, array in golden.items()}
    args = argparse.Namespace(
        decoder_embed_dim=32,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_embed_dim=48,
        activation_fn="gelu",
    )
    state["decoder.version"] = torch.tensor([3.0])
    torch.save({"args": args, "model": state}, tmp_path / "path" / "to" / "checkpoint_best.pt")


def test_the_pages_have_python():
    assert len(WITH_PYTHON) >= 4


# Ten seconds and more each: a tour of everything that test_public_surface.py has, and a run of test_hooks.py's kind.
LONG = ("docs/library.md", "docs/training.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.long if name(page) in LONG else ()) for page in WITH_PYTHON],
    ids=name,
)
def test_python_blocks_run(page, readers_files, capsys, request):
    readers_files(page)
    if "checkpoint_best.pt" in page.read_text():
        request.getfixturevalue("fairseqs_checkpoint")
    names = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
            printed = capsys.readouterr().out
            assert block.shown is None or printed == block.shown, block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_blocks_are_configurations(page):
    for block in blocks(page):
        if block.language == "yaml":
            settings = dict(flatten(yaml.safe_load(block.text)))
            assert settings
            gather([], [f"{path}={value}" for path, value in settings.items()])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_that_is_checked(page):
    assert {block.language for block in blocks(page)} <= {"bash", "json", "python", "text", "yaml"}
