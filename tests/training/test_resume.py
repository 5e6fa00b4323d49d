"""A run stopped and taken up again is the run that was never stopped, bit for bit; and what is refused on the way."""

import dataclasses

import numpy as np
import pytest
from bitwise import assert_bitwise
from document_runs import STEPS, document_run, final_state, renamed

from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Six steps over two dozen short documents; dropout, accumulation and segment ids, so that all of them resume."""
    return document_run(
        tmp_path,
        "resumed",
        small_config(scheme="pre", vocab_size=257, dropout=0.1),
        data={"segment_ids": True},
        train={"batch_size": 4, "grad_accumulation": 2},
        mesh={"data": 2, "fsdp": 1, "tensor": 4},
        checkpoint={"every": 2, "keep": 10},
        eval={"every": 4},
    )


def _records(config, tmp_path):
    records = read_records(tmp_path / "runs" / config.run.name)
    timing = ("tokens_per_second", "mfu")
    timed = {key for record in records for key in record if key in timing or key.startswith("time/")}
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


class _KilledError(Exception):
    """Stands for a process that ends without a word."""


# Numbers of norms, which no matrix is, and their moments come back as well.
DYT = {"norm": "dyt", "learned_embedding_scale": True, "norm_alpha": (0.8, 0.2, 0.2)}


# test_plugin_norms.py resumes numbers of norms in every `make test`.
@pytest.mark.parametrize("keys", [pytest.param({}, id="rmsnorm"), pytest.param(DYT, id="dyt", marks=pytest.mark.long)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(keys, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **keys))
    whole = renamed(config, "whole")
    loop.train(whole)

    step = Program.train_step
    taken = []

    def dies_in_step_four(self, state, batch):
        taken.append(batch["tokens"])
        if len(taken) == 4:
            raise _KilledError
        return step(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "train_step", dies_in_step_four)
        with pytest.raises(_KilledError):
            loop.train(config)
        died_after = list(taken)
        loop.train(config)  # from the checkpoint of step 2: steps 3 to 6
    np.testing.assert_array_equal(taken[len(died_after)], died_after[2])

    ours, our_data = final_state(config)
    expected, expected_data = final_state(whole)
    assert_bitwise(ours, expected)
    if keys:  # they have moved
        assert (np.abs(ours.params["run_0"]["feed_forward_pre_norm"]["alpha"] - 0.2) > 1e-4).all()
        assert (np.abs(ours.params["embedding_scale"]["scale"] - config.model.d_model**0.5) > 1e-4).all()
    assert our_data == expected_data
    assert our_data["iterator"] == {"next_index": STEPS}
    assert _records(config, tmp_path) == _records(whole, tmp_path)
    assert [record["step"] for record in _records(whole, tmp_path) if "train/loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in _records(whole, tmp_path) if "eval/validation/loss" in record] == [4, 6]


def test_a_finished_run_is_evaluated_again_and_left_as_it_is(config, tmp_path, capsys):
    once = loop.train(config)
    file = tmp_path / "runs/resumed/metrics.jsonl"
    before = file.read_text()
    again = loop.train(config)
    assert again == once
    assert "note:" not in capsys.readouterr().err
    loop.train(dataclasses.replace(config, eval=dataclasses.replace(config.eval, batches=2)))
    assert "note: eval.batches: saved 1, asked 2: this counts for the scores below alone" in capsys.readouterr().err
    assert file.read_text() == before

    # eval.py's way: other devices, the newest checkpoint or a named one.
    anywhere = evaluate_run(str(tmp_path / "runs/resumed"), ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"])
    assert anywhere.step == STEPS
    assert anywhere.scores["validation"].loss == pytest.approx(once["validation"].loss, rel=1e-5)
    earlier = evaluate_run(str(tmp_path / "runs/resumed/checkpoints/000002"), ["eval.batches=1"], progress=False)
    assert earlier.step == 2
    assert earlier.scores["validation"].loss > once["validation"].loss
    with pytest.raises(ConfigError, match=r"model\.scheme: saved pre, asked hybrid\b"):
        evaluate_run(str(tmp_path / "runs/resumed"), ["model.scheme=hybrid"])

    # A run may start from these parameters.
    heir = dataclasses.replace(renamed(config, "heir"), init_from=str(tmp_path / "runs/resumed"))
    program = Program(heir)
    with Checkpoints(tmp_path / "runs/resumed/checkpoints", keep=10) as checkpoints:
        expected = checkpoints.restore_params(program.abstract_state.params)
    short = dataclasses.replace(heir, optimizer=dataclasses.replace(heir.optimizer, learning_rate=1e-20))
    loop.train(short)
    state, _ = final_state(short)
    assert_bitwise(state.params, expected)
    assert int(state.step) == STEPS

    # And a model of another shape may not.
    wider = dataclasses.replace(renamed(heir, "wider"), model=dataclasses.replace(heir.model, mlp_dim=64))
    with pytest.raises(
        ConfigError, match=r"its parameters belong to another model \(model\.mlp_dim: saved 48, asked 64"
    ):
        loop.train(wider)


def test_another_configuration_in_the_same_directory_is_refused_by_key(config, tmp_path):
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    file = tmp_path / "runs/resumed/config.yaml"
    assert not loop.open_run_directory(other)[0].exists()  # nothing is made before all is checked
    file.parent.mkdir(parents=True)
    loop.write_config(file.parent, other)
    loop.open_run_directory(config)  # nothing was saved or recorded yet, so nothing stands in the way
    loop.write_config(file.parent, config)
    before = file.read_text()
    (tmp_path / "runs/resumed/checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"resumed holds another run \(train\.seed: saved 0, asked 1\)"):
        loop.open_run_directory(other)
    assert file.read_text() == before
    more_often = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=3))
    loop.write_config(*loop.open_run_directory(more_often))
    assert "every: 3" in file.read_text()


def test_data_that_changed_since_the_checkpoint_is_refused(config, tmp_path):
    short = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=100))
    loop.train(short)
    files = [tmp_path / "runs/resumed" / name for name in ("metrics.jsonl", "config.yaml")]
    before = [file.read_bytes() for file in files]
    for number in range(100, 110):  # enough for some to be trained on
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 30)
    with pytest.raises(
        UserError,
        match=r"data\.files: 100\.txt is read now in the place of 11\.txt, which was read when step 6 was saved",
    ):
        loop.train(dataclasses.replace(short, eval=dataclasses.replace(config.eval, every=50)))
    assert [file.read_bytes() for file in files] == before
