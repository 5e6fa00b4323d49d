"""The coordinate check: with the rules of muP activations do not depend on the width, and without them they grow."""

import dataclasses
import json

import numpy as np
import pytest

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.run_config import OptimizerSection, RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab import width_check
from hybridnorm_jax.lab.width_check import LARGEST_SPREAD, WidthOptions

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64, "vocab_size": 61}


@pytest.fixture
def config(small_config):
    optimizer = OptimizerSection(learning_rate=0.01, schedule="constant")
    return RunConfig(model=small_config(**SMALL, num_kv_heads=4), optimizer=optimizer)


@pytest.mark.long
def test_a_block_of_width_256_is_as_large_as_one_of_32_with_the_rules_and_ten_times_as_large_without(config):
    """Pre-Norm's stream shows it best: no norm stands behind its blocks.

    With the rules the spread is that of another draw of the parameters, measured at most 1.1 for three seeds. Without
    them the directions of Adam add up over eight times as many channels in each matrix.
    """
    options = WidthOptions(schemes=("pre",), widths=(32, 256), updates=5)
    found = {rules: width_check.measure(config, options, "pre", follows_rules=rules) for rules in (True, False)}
    assert found[True].rms.shape == (2, 5, 3)
    assert found[True].spread < LARGEST_SPREAD
    assert 1 / LARGEST_SPREAD < found[True].growth < LARGEST_SPREAD
    assert found[False].spread > 4
    assert found[False].growth > 4
    # At the base width both are one model.
    np.testing.assert_array_equal(found[True].rms[0], found[False].rms[0])
    assert np.isfinite(found[True].losses).all()


def test_models_keep_their_shape_and_have_more_heads(config, small_config):
    config = dataclasses.replace(config, model=small_config(**SMALL | {"d_model": 64, "mlp_dim": 96}))
    options = WidthOptions(widths=(32, 128))
    model = width_check.of_width(config, options, "span", 128, follows_rules=True).model
    assert (model.scheme, model.d_model, model.mlp_dim, model.base_width) == ("span", 128, 192, 32)
    assert (model.head_dim, model.num_heads, model.num_kv_heads) == (8, 16, 16)
    assert width_check.of_width(config, options, "span", 32, follows_rules=False).model.base_width is None
    with pytest.raises(ConfigError, match=r"^widths=36: must be a multiple of 8, the width of a head"):
        width_check.of_width(config, options, "span", 36, follows_rules=True)


def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    """What is trained is planted: with the rules a stream of 2 everywhere that changes by 1, without width / 8."""

    def trained(config):
        size = 2.0 if config.model.base_width else config.model.d_model / 8
        assert config.optimizer.learning_rate == 0.01
        return np.full((1, 4), size), np.full((1, 4), size / 2), np.zeros(1)

    monkeypatch.setattr(width_check, "_trained", trained)
    keys = ["schemes=[post]", "widths=[16,8]", "updates=1", "model.num_heads=2", f"out={tmp_path}"]
    assert main(["lab", "widths", *keys]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[:1] == ["post"]]
    assert rows == [["post", "muP", "2", "2", "1", "1"], ["post", "none", "1", "2", "2", "2"]]
    document = json.loads((tmp_path / "widths.json").read_text())
    assert [each["widths"] for each in document["measured"]] == [[8, 16], [8, 16]]
    assert np.shape(document["measured"][0]["rms"]) == (2, 1, 4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("schemes=[ngpt]", "model.base_width=32: not with model.scheme=ngpt, which keeps matrices at unit length"),
        ("widths=[32]", "widths=[32]: at least two are needed, none of them twice"),
        ("widths=[32,33]", "widths=33: must be a multiple of 8"),
        ("model.d_model=64", "model.d_model=64: widths=[...] sets it here"),
        ("schemes=[prre]", "schemes=prre: not known; did you mean 'pre'?"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(argument, message, tmp_path, capsys):
    assert main(["lab", "widths", argument, f"out={tmp_path}/out"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
