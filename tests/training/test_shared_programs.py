"""Runs that differ only in numbers share compiled steps, and compute what each would with its own."""

import dataclasses

import jax
import numpy as np
import pytest

from hybridnorm_jax.config.run_config import OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.shared_programs import SharedPrograms

NUMBERS = {
    "train": {"steps": 30, "seed": 5},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "final_ratio": 0.5, "weight_decay": 0.3},
}
STRUCTURE = (
    ("model", "dtype", "bfloat16"),
    ("model", "scheme", "post"),
    ("optimizer", "b1", 0.5),
    ("optimizer", "clip", 0.25),
    ("optimizer", "schedule", "linear"),
    ("optimizer", "decay_embeddings", True),
    ("train", "z_loss", 1e-3),
    ("train", "skip_spikes_sigma", 3.0),
    ("data", "segment_ids", True),
)


@pytest.fixture
def config(small_config):
    return RunConfig(
        model=small_config(num_layers=1, dropout=0.2, scheme="pre"),
        train=TrainSection(batch_size=8, seq_len=8, steps=20),
        optimizer=OptimizerSection(learning_rate=3e-3, warmup_steps=2),
    )


def _with(config, sections):
    for section, values in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    return config


def _two_steps(program):
    tokens = np.random.default_rng(0).integers(0, 61, (1, 8, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
    state, _ = program.train_step(program.fresh_state(), batch)
    state, metrics = program.train_step(state, batch)
    return jax.device_get((state, metrics))


def _mesh():
    return make_mesh({"data": 1}, jax.devices()[:1])


def test_numbers_are_arguments_of_one_compiled_step(config):
    """Rate, warm-up, length, decay and seed, of parameters and dropout too: bit for bit as with steps of its own."""
    first, other = Program(config, _mesh()), _with(config, NUMBERS)
    of_first = _two_steps(first)
    shared = first.sharing(other)
    of_other = _two_steps(shared)
    compiled = first._train_step._cache_size()
    assert compiled == 1
    jax.tree.map(np.testing.assert_array_equal, of_other, _two_steps(Program(other, _mesh())))
    jax.tree.map(np.testing.assert_array_equal, of_first, _two_steps(shared.sharing(config)))
    assert float(of_other[1]["learning_rate"]) == pytest.approx(1e-2 * 2 / 3)
    assert float(of_first[1]["learning_rate"]) == pytest.approx(3e-3)


@pytest.mark.parametrize(("section", "key", "value"), STRUCTURE, ids=str)
def test_what_is_compiled_is_not_shared(config, section, key, value):
    program = Program(config, _mesh())
    if key == "scheme":
        other = dataclasses.replace(config, model=config.model.with_scheme(value))
    else:
        other = _with(config, {section: {key: value}})
    assert program.sharing(other) is None
    assert program.sharing(config) is not None


def test_the_newest_program_is_kept_for_the_next_run(config):
    programs = SharedPrograms()
    first = programs.program(config)
    programs.keep(first)
    again = programs.program(_with(config, NUMBERS))
    assert again._train_step is first._train_step
    assert programs.program(_with(config, {"model": {"dtype": "bfloat16"}}))._train_step is not first._train_step
