"""What a run's directory says of the run, and what becomes of it when its config.yaml is lost or torn."""

import dataclasses
import signal

import numpy as np
import pytest

from hybridnorm_jax.config import yaml_files
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.stopping import StopSignals


@pytest.fixture
def config(tmp_path, small_config):
    """Two steps over random tokens."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path)),
        model=small_config(num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=(str(tmp_path / "tokens.npy"),), validation_fraction=0.0
        ),
        train=TrainSection(2, 8, 8),
    )


def test_without_config_yaml_the_newest_checkpoint_says_what_the_run_is(config, tmp_path):
    loop.train(config)
    file = tmp_path / "run/config.yaml"
    file.unlink()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0))
    with pytest.raises(ConfigError, match=r"holds another run \(optimizer\.learning_rate: saved 0\.0003, asked 1\.0\)"):
        loop.train(other)
    assert not file.exists()  # nothing is claimed before it is checked
    loop.train(config)
    assert yaml_files.from_yaml(file.read_text()) == config

    file.write_text("a: [")
    with pytest.raises(ConfigError, match=r"run/config\.yaml, line 2: not valid YAML"):
        loop.train(config)


def test_a_directory_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    blocked = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "file")))
    with pytest.raises(UserError, match="file/run"):
        loop.train(blocked)


def test_a_signal_that_was_to_be_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGINT, before)
