"""The papers' claims about signal and gradients at initialization, measured; and the command that shows them."""

import json

import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.lab import signal_at_start
from hybridnorm_jax.lab.signal_at_start import Signal
from hybridnorm_jax.lab.signal_claims import claims

MODEL = hn.ModelConfig(d_model=64, num_heads=2, mlp_dim=256, vocab_size=61)


def _measure(scheme, depth, *initializers):
    batch = signal_at_start.random_batch(61, 2, 32, seed=0)
    return [found.measures for found in signal_at_start.measure(MODEL, scheme, depth, initializers, batch, seed=0)]


def test_pres_stream_grows_with_depth():
    (shallow,), (deep,) = _measure("pre", 4, "normal"), _measure("pre", 16, "normal")
    assert deep["stream_rms"][-1] > 1.5 * shallow["stream_rms"][-1] > 3 * shallow["stream_rms"][0]
    assert np.all(deep["stream_rms"][4:] > deep["stream_rms"][:-4])  # block by block the rise may pause


@pytest.mark.parametrize("scheme", others_are_long(["post", "span"], ["span"]))
def test_posts_and_spans_streams_do_not(scheme):
    (deep,) = _measure(scheme, 16, "normal")
    np.testing.assert_allclose(deep["stream_rms"][1:], 1, rtol=0.01)


@pytest.mark.long
def test_spans_gradients_stay_bounded_with_megatron_alone():
    """Of the weights of block 1 over those of the last, as PAPERS has it: 8 to 96 blocks."""
    ratio = {}
    for depth in (8, 96):
        for name, measures in zip(("normal", "megatron"), _measure("span", depth, "normal", "megatron"), strict=True):
            ratio[name, depth] = measures["gradient/block"][0] / measures["gradient/block"][-1]
    assert ratio["megatron", 96] < 2 * ratio["megatron", 8]
    assert ratio["normal", 96] > 4 * ratio["megatron", 96]


def _signal(scheme, depth, initializer="normal", **measures):
    return Signal(scheme, depth, initializer, {name: np.array(values) for name, values in measures.items()})


def test_claims_say_what_was_seen():
    def of(scheme, weights, stream, rms=(1, 1, 1), initializer="normal", depth=2):
        measures = {"gradient/block": weights, "stream_gradient": stream, "stream_rms": rms}
        return _signal(scheme, depth, initializer, **measures)

    (grows, *_) = claims([of("pre", [1, 1], [1, 1, 1], rms=[1, 1.2, 2.0])])
    assert grows.holds
    assert "1.67 at L=2" in grows.seen
    deeper = of("pre", [1, 1], [1, 1, 1], rms=[1, 2, 3.1], depth=4)  # 1.55: less than at 2 blocks
    (grows, *_) = claims([of("pre", [1, 1], [1, 1, 1], rms=[1, 1.2, 2.0]), deeper])
    assert not grows.holds
    shallow, deeper = of("pre", [3, 1], [9, 9, 1]), of("pre", [5, 1], [9, 8, 1], depth=4)
    assert [claim.holds for claim in claims([shallow, deeper])][1:] == [True, False]  # the stream's: 9, then 8
    assert [claim.holds for claim in claims([of("pre", [3, 1], [9, 9, 1])])][1:] == [False, True]  # 3 is flat
    assert [claim.holds for claim in claims([of("post", [1, 4], [9, 3, 4])])] == [True, False]
    assert [claim.holds for claim in claims([of("hybrid", [1, 3], [9, 1, 5])])] == [True, False]
    span = [of("span", [8, 1], [2, 2, 1], initializer=name, depth=2) for name in ("normal", "megatron")]
    deep = [of("span", [80, 1], [2, 2, 1], initializer=name, depth=96) for name in ("normal", "megatron")]
    assert [(claim.initializer, claim.holds) for claim in claims([*span, *deep])] == [
        ("normal", True),
        ("normal", False),
        ("megatron", False),
        ("megatron", True),
    ]
    assert claims([_signal("peri", 2)]) == []
    # auto is what the scheme recommends: megatron for span, of which something else is claimed than of normal.
    auto = [of("span", [8, 1], [2, 2, 1], initializer="auto", depth=depth) for depth in (2, 96)]
    assert [(claim.initializer, claim.holds) for claim in claims(auto)] == [("auto", True), ("auto", True)]
    assert all("stays bounded" in claim.statement for claim in claims(auto))
    assert claims([of("span", [8, 1], [2, 2, 1], initializer="b2t", depth=depth) for depth in (2, 96)]) == []


def test_the_command_writes_table_json_and_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [
        "signal",
        "schemes=[pre,hybrid_star]",
        "depths=[2]",
        "initializers=[auto]",
        "seq_len=16",
        f"out={tmp_path}",
    ]
    assert main(["lab", *arguments, "model.d_model=16", "model.num_heads=2", "model.mlp_dim=16"]) == 0
    told = capsys.readouterr().out
    assert "pre                    2 auto" in told
    assert "holds         [auto] pre: the stream grows" in told or "DOES NOT HOLD [auto] pre: the stream grows" in told
    written = json.loads((tmp_path / "signal.json").read_text())
    assert [model["scheme"] for model in written["models"]] == ["pre", "hybrid_star"]
    assert len(written["models"][0]["stream_rms"]) == 3
    assert written["models"][1]["gradient/attention_post_norm"][0] is None
    assert written["model"]["d_model"] == 16
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"stream_rms.png", "gradient-block.png", "attention_entropy.png"} <= names


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("schemes=[hybird]", "schemes=hybird: not known; did you mean 'hybrid'?"),
        ("schemes=[]", "schemes=[]: at least one is needed"),
        ("depths=[0]", "depths=[0]: must be at least 1"),
        ("depths=[a]", "depths=[a]: expected a list of integers"),
        ("initializers=[meg]", "initializers=meg: not known"),
        ("scheme=[pre]", "scheme=[pre]: no such key; did you mean 'schemes'?"),
        ("model.depth=3", "model.depth=3: no such key"),
        ("model.num_layers=3", "model.num_layers=3: depths=[...] sets it here"),
        ("model.dtype=float64", "model.dtype=float64: needs JAX_ENABLE_X64=1"),
        ("out=", "out='': must name a directory"),
        ("out=/proc/nowhere", "/proc/nowhere: No such file or directory"),
    ],
)
def test_wrong_arguments_end_in_one_line(argument, message, capsys):
    assert main(["lab", "signal", argument]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
