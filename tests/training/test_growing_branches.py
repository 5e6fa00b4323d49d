"""Training with branches that grow: the steps count, and a checkpoint is scored, read and exported at its own."""

import dataclasses

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Four steps at a constant rate, after which the last layer has half its branches."""
    tokens = np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="growing", dir=str(tmp_path / "runs")),
        model=small_config(scheme="prores_pre", ramp_steps=8),
        data=dataclasses.replace(
            default.data, source="tokens", files=(str(tmp_path / "tokens.npy"),), validation_fraction=0.2
        ),
        train=dataclasses.replace(default.train, steps=4, batch_size=8, seq_len=16, log_every=1, watch_every=2),
        optimizer=dataclasses.replace(default.optimizer, schedule="constant"),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
        eval=dataclasses.replace(default.eval, every=2, batches=1),
    )


def test_a_checkpoint_has_the_scales_of_its_own_step(config, tmp_path):
    scores = loop.train(config)
    records = {step: {} for step in (1, 2, 3, 4)}
    for record in read_records(tmp_path / "runs/growing"):
        records[record["step"]] |= record
    for step in (2, 4):
        saved, _ = hn.load_run(str(tmp_path / f"runs/growing/checkpoints/{step:06d}"))
        assert saved.model.ramp_at == step
        alone = evaluate_run(str(tmp_path / f"runs/growing/checkpoints/{step:06d}"), progress=False)
        assert alone.scores["validation"].loss == pytest.approx(records[step]["eval/validation/loss"], rel=1e-6)
    assert records[4]["eval/validation/loss"] == scores["validation"].loss
    # The first update finds branches that add nothing: only what is outside the blocks has a gradient.
    assert records[1]["train/loss"] != records[2]["train/loss"]


def test_training_takes_the_scales_of_each_step(config):
    program = Program(config)
    rng = np.random.default_rng(1)
    batch = {name: rng.integers(0, 61, (1, 8, 16)).astype(np.int32) for name in ("tokens", "targets")}
    batch["weights"] = np.ones((1, 8, 16), np.float32)
    for step in (0, 3):
        state = program.fresh_state()
        params = jax.device_get(state.params)
        at_step = dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))
        _, metrics = program.train_step(at_step, batch)
        logits = jax.jit(hn.Decoder(config.model.at_step(step)).apply)({"params": params}, batch["tokens"][0])
        expected = -np.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][0][..., None], -1).mean()
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_training_goes_on_where_the_branches_were(config, tmp_path):
    """At a constant rate the first two steps are those of the longer run."""
    loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
    loop.train(config)
    loop.train(dataclasses.replace(config, run=dataclasses.replace(config.run, name="at_once")))
    (_, resumed), (_, at_once) = (hn.load_run(str(tmp_path / "runs" / name)) for name in ("growing", "at_once"))
    for left, right in zip(jax.tree.leaves(resumed), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.long  # another program is compiled
def test_a_run_may_begin_with_branches_that_have_grown(config, tmp_path):
    """A run starts again at step 0, where branches that grow add nothing: whoever goes on says where they stand."""
    loop.train(config)
    model = dataclasses.replace(config.model, ramp_at=4)
    heir = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name="heir"),
        model=model,
        init_from=str(tmp_path / "runs/growing"),
        train=dataclasses.replace(config.train, steps=1),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-20),
    )
    scores = loop.train(heir)
    scored = evaluate_run(str(tmp_path / "runs/growing"), progress=False).scores["validation"].loss
    assert scores["validation"].loss == pytest.approx(scored, rel=1e-6)
