"""A kind of norm of a user's own file is trained, scored, resumed, loaded and generated from like any other."""

import dataclasses

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.metrics_file import read_records

SOURCE = """
import jax.numpy as jnp

import hybridnorm_jax as hn


@hn.norm_kind("mine", parameters=[hn.NormParameter("alpha", start=0.7), hn.NormParameter("v", ("width",))])
def mine(x, alpha, v):
    return alpha * x / (1 + jnp.abs(v * x))
"""
TINY = [
    *("model.d_model=16", "model.num_heads=2", "model.num_layers=2", "model.mlp_dim=16", "model.vocab_size=61"),
    *("model.scheme=hybrid_star", "model.norm=mine", "model.norm_alpha=[0.6]", "model.learned_embedding_scale=true"),
    *("train.batch_size=8", "train.seq_len=8", "train.log_every=1", "checkpoint.every=2", "eval.batches=1"),
    *("optimizer.schedule=constant", "optimizer.warmup_steps=0", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
]

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def new_start(monkeypatch):
    """Makes this process one that has imported no plugin."""

    def forget():
        monkeypatch.setattr(plugins, "_imported", {})
        hn.NORM_KINDS.pop("mine", None)

    forget()
    return forget


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the plugin, the tokens and the runs lie."""
    folder = tmp_path_factory.mktemp("norms")
    for seed, name in enumerate(("tokens", "held")):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, 61, 600).astype(np.uint16))
    (folder / "my_norms.py").write_text(SOURCE)
    return folder


@pytest.fixture
def file(folder):
    """The plugin, which is what it was after the test."""
    yield folder / "my_norms.py"
    (folder / "my_norms.py").write_text(SOURCE)


@pytest.fixture(scope="module")
def arguments(folder):
    """Of a run with the plugin."""
    return [
        *TINY,
        f"run.plugins=[{folder}/my_norms.py]",
        f"run.dir={folder}/runs",
        "data.source=tokens",
        "data.validation_fraction=0",
        f"data.files=[{folder}/tokens.npy]",
        f"data.validation.held=[{folder}/held.npy]",
    ]


@pytest.fixture(scope="module")
def trained(folder, arguments):
    """The directory of a run of two steps."""
    loop.train(parse([*arguments, "run.name=run", "train.steps=2"]))
    return f"{folder}/runs/run"


def test_a_kind_of_a_plugin_is_trained_scored_and_resumed_bit_for_bit(arguments, new_start, file, folder):
    loop.train(parse([*arguments, "run.name=whole", "train.steps=4"]))
    loop.train(parse([*arguments, "run.name=parts", "train.steps=2"]))
    new_start()
    scores = loop.train(parse([*arguments, "run.name=parts", "train.steps=4"]))
    losses = [record["train/loss"] for record in read_records(folder / "runs/parts") if "train/loss" in record]
    assert len(losses) == 4
    assert np.isfinite(losses).all()

    new_start()
    _, whole = hn.load_run(f"{folder}/runs/whole", plugins=[str(file)])
    config, parts = hn.load_run(f"{folder}/runs/parts", plugins=[str(file)])
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    norm = parts["run_0"]["attention_pre_norm"]
    assert {name: leaf.shape for name, leaf in norm.items()} == {"scale": (1, 16), "alpha": (1, 1), "v": (1, 16)}
    assert norm["alpha"] != 0.6

    # What alpha started at is no part of the function.
    words = [f"run.plugins=[{file}]", "model.norm_alpha=[0.1]"]
    scored = evaluate_run(f"{folder}/runs/parts", words, progress=False).scores
    assert scored["held"].loss == pytest.approx(scores["held"].loss, rel=1e-6)
    (text,) = hn.generate(config.model, parts, [[1, 2, 3]], max_new_tokens=4)
    by_hand, apply = np.array([1, 2, 3, 0, 0, 0, 0]), jax.jit(hn.Decoder(config.model).apply)
    for place in range(3, 7):  # no token sees those that follow
        by_hand[place] = apply({"params": parts}, by_hand[None])[0, place - 1].argmax()
    assert text.tolist() == by_hand[3:].tolist()


def test_what_a_saved_configuration_names_is_not_imported(trained, new_start):
    for read in (hn.load_run, evaluate_run):
        with pytest.raises(hn.ConfigError, match=r"my_norms\.py\]: a saved configuration runs no code; "):
            read(trained)
    assert "mine" not in hn.NORM_KINDS


def test_it_is_exported_to_jax_alone(trained, new_start, file, tmp_path, capsys):
    words = ["export", trained, f"{tmp_path}/out", f"run.plugins=[{file}]"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.norm=mine: a kind of a plugin's, which the PyTorch code")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*words, "--format=safetensors"]) == 0
    assert (tmp_path / "out/model_config.json").exists()


def test_without_its_plugin_the_kind_is_not_known(arguments, new_start):
    with pytest.raises(hn.ConfigError, match=r"^model\.norm=mine: not known"):
        parse([word for word in arguments if not word.startswith("run.plugins")])


@pytest.mark.usefixtures("trained")
def test_an_edited_kind_is_another_run(arguments, new_start, file):
    file.write_text(SOURCE.replace("1 +", "2 +"))
    config = parse([*arguments, "run.name=run", "train.steps=2"])
    with pytest.raises(hn.ConfigError, match=r"my_norms\.py is not the file that .* was trained with; name that file"):
        loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)))
