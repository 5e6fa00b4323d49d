"""A step that no device here has room for is refused before anything is made."""

import dataclasses

import jax
import pytest

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.memory import LeastBytes, check_room, least_bytes
from hybridnorm_jax.training.program import Program

TINY = ModelConfig(d_model=16, num_heads=2, num_layers=3, mlp_dim=32, vocab_size=61)


def test_the_least_a_step_needs_is_counted_by_hand():
    config = RunConfig(model=TINY, train=TrainSection(batch_size=32, seq_len=64, grad_accumulation=2))
    program = Program(config)
    least = least_bytes(config, program.abstract_state, microbatch=16)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    assert parameters * 12 <= least.state <= parameters * 12 + 10_000  # parameters and two moments, in float32
    tokens = 16 * 64
    assert least.activations == tokens * (3 * 16 + 61) * 4 // jax.device_count()
    chunked = dataclasses.replace(config, train=dataclasses.replace(config.train, loss_chunk=8))
    assert (
        least_bytes(chunked, program.abstract_state, microbatch=16).activations
        == 16 * (64 * 48 + 8 * 61) * 4 // jax.device_count()
    )


def test_a_device_that_has_less_is_named_with_what_is_there():
    check_room(LeastBytes(state=10, activations=5), 15)
    check_room(LeastBytes(state=10**20, activations=5), None)
    with pytest.raises(
        UserError, match=r"at least 2\.0 GiB .* 1\.0 GiB of activations .* has 2\.0 GiB.*train\.batch_size"
    ):
        check_room(LeastBytes(state=2**31, activations=2**30), 2**31)


def test_a_run_that_cannot_fit_is_refused_and_writes_nothing(tmp_path):
    config = RunConfig(model=TINY, train=TrainSection(batch_size=800, seq_len=2_000_000))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path), name="x"))
    with pytest.raises(UserError, match=r"a step needs at least .* train\.seq_len"):
        train(config)
    assert not list(tmp_path.iterdir())
