"""The papers' claims: the table, how its cheap claims are measured, and what the command says of them."""

import dataclasses
import json
import math
import shlex
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.equivalence import decoder_forms
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.claims import at_start, coupling, forms, measures, speed, training
from hybridnorm_jax.lab.claims.claim import Finding, read_claims
from hybridnorm_jax.lab.compare_options import comparison
from hybridnorm_jax.model.attention import Attention

REPOSITORY = Path(__file__).parents[2]
# A model of two narrow blocks, and three short sequences of random tokens to train it on.
TINY = ("model.d_model=16", "model.num_heads=2", "model.mlp_dim=32", "model.vocab_size=61", "model.scan_unroll=1")
ENTRY = "- {id: one, paper: SpanNorm, source: abstract, statement: It holds., scale: none, cheap: true}\n"


# ---- The table.


def test_every_cheap_claim_has_a_measure_and_no_other_has():
    assert [name for name, claim in read_claims().items() if claim.cheap] == list(measures.MEASURES)


def test_every_command_of_the_table_is_taken():
    for claim in read_claims().values():
        for command in claim.commands:
            program, *words = shlex.split(command)
            if program == "python":
                assert (REPOSITORY / words[0]).is_file(), command
                continue
            assert program == "hybridnorm", command
            if words[:2] == ["lab", "compare"]:
                comparison(words[2:])
            elif words[:2] == ["lab", "claims"]:
                assert words[2:] == [claim.id]
            else:
                assert words[0] == "train", command
                parse(words[1:])


def test_what_was_found_says_when_and_on_what():
    for claim in read_claims().values():
        assert bool(claim.date) == (claim.number != "not run yet"), claim.id
        assert claim.cheap <= bool(claim.date), claim.id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY + ENTRY, "one: two claims have this id"),
        (ENTRY.replace("SpanNorm", "Span"), "one: paper=Span: must be HybridNorm"),
        (ENTRY.replace("scale: none", "verdict: maybe, scale: none"), "verdict=maybe: must be held, did not hold"),
        (ENTRY.replace("scale: none", "verdict: held, scale: none"), "date=: needed where there is a verdict"),
        (
            ENTRY.replace("scale: none", "date: 1.1., machine: x, scale: none"),
            "reason=: needed where it cannot be told",
        ),
        (ENTRY.replace("cheap: true", "reason: none"), "commands=(): at least one is needed"),
        (ENTRY.replace("source", "sauce"), "one: sauce: no such key; did you mean 'source'?"),
        (ENTRY.replace("scale: none, ", ""), "one: scale is missing"),
        (
            ENTRY.replace("scale: none", "date: 2026-11-28, reason: x, scale: none"),
            "date=2026-11-28: goes with machine",
        ),
        ("one: two", "must be a list of claims"),
    ],
)
def test_a_wrong_table_ends_in_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        read_claims(text)
    assert message in str(error.value)


# ---- Theorem 2.


def test_elasticities_are_those_of_a_computation_by_hand():
    """One head of two channels, every matrix the identity, x = (1, 0), (0, 1); the loss is one number of token 2.

    Token 2 has scores 0 and s = 1/sqrt(2), so p = 1 / (1 + e^-s) falls on itself, and its output is (1 - p, p). Its
    first channel has the gradient -p (1 - p) k x^T / sqrt(2) in W_Q. Times c, W_K makes c s of s and scales k, so
    d log |dW_Q| / d log c = 1 + (1 - 2 p) s. W_V scales what is weighted, and so the gradient of W_Q: 1.
    """
    with jax.enable_x64(True):
        attention = Attention(num_heads=1, dtype=jnp.float64, param_dtype=jnp.float64)
        identity = jnp.eye(2, dtype=jnp.float64)
        params = {name: {"kernel": identity.reshape(2, 1, 2)} for name in ("query", "key", "value")}
        params["out"] = {"kernel": identity.reshape(1, 2, 2)}
        cotangent = jnp.asarray([[[0.0, 0.0], [1.0, 0.0]]])
        found = coupling.elasticities(attention, params, identity[None], cotangent)
    s = 1 / math.sqrt(2)
    p = 1 / (1 + math.exp(-s))
    slope = 1 + (1 - 2 * p) * s
    by_key = [(1 - 2 * p) * s, slope, 1.0]  # of W_Q: by W_Q itself, by W_K, by W_V
    np.testing.assert_allclose(found[0], by_key, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], [slope, (1 - 2 * p) * s, 1.0], rtol=0, atol=1e-12)
    assert found[2, 2] == 0  # the output is linear in W_V


def test_a_gradient_that_is_normalized_does_not_depend_on_the_others():
    assert coupling.decoupled(scheme="hybrid", without="pre").holds
    # With norms on q and k alone W_V still scales the gradients of W_Q and W_K, and without any all is coupled.
    assert not coupling.decoupled(scheme="qk_post", without="pre").holds
    assert not coupling.decoupled(scheme="pre", without="pre").holds
    assert not coupling.decoupled(scheme="hybrid", without="qkv_post").holds


# ---- Fresh models.


@pytest.mark.long
def test_a_scheme_of_which_a_claim_is_false_does_not_hold():
    sizes = {"initializer": "normal", "depths": (2, 12), "arguments": TINY}
    assert at_start.checked("pre", "stream_rms", **sizes).verdict == "held"
    assert at_start.checked("pre", "stream_rms", scheme="post", **sizes).verdict == "did not hold"
    assert at_start.stream_is_bounded(scheme="post", **sizes).verdict == "held"
    assert at_start.stream_is_bounded(scheme="pre", **sizes).verdict == "did not hold"
    sizes = {"initializer": "megatron", "depths": (12,), "arguments": TINY}
    assert at_start.checked("hybrid", "stream_gradient", **sizes).verdict == "held"
    planted = at_start.checked("hybrid", "stream_gradient", scheme="hybrid_star", **sizes)
    assert planted.verdict == "did not hold"


def test_a_claim_about_two_schemes_turns_with_them():
    sizes = {"depths": (12,), "arguments": TINY}
    one = at_start.above_baseline("token_similarity", scheme="hybrid", baseline="pre", sign=-1, **sizes)
    other = at_start.above_baseline("token_similarity", scheme="pre", baseline="hybrid", sign=-1, **sizes)
    assert (one.verdict, other.verdict) == ("held", "did not hold")


# ---- Forms of a Pre-LN model.


@pytest.fixture
def uncentred(monkeypatch):
    """A conversion that leaves the mean in."""
    forms.measured.cache_clear()
    monkeypatch.setattr(decoder_forms, "recenter", lambda params, layout: params)
    yield
    forms.measured.cache_clear()


SMALL = {"d_model": 16, "num_heads": 2, "num_layers": 2, "mlp_dim": 32, "vocab_size": 61}


@pytest.fixture
def small_model():
    return dataclasses.replace(forms.MODEL, head_dim=None, num_kv_heads=None, init_std=None, **SMALL)


def test_forms_are_lossless(small_model):
    assert forms.lossless("pre_rmsnorm", model=small_model).holds
    assert forms.lossless("pre_crmsnorm", model=small_model).holds
    assert forms.norm_formula(model=small_model).holds
    assert forms.from_scratch(model=small_model).holds
    vit = dataclasses.replace(forms.VIT, d_model=16, num_layers=1, mlp_dim=32, init_std=None, head_dim=None)
    assert forms.lossless("pre_crmsnorm", model=vit).holds
    assert forms.mean_in_bfloat16(model=small_model).holds


def test_with_dropout_forms_are_equal_where_the_mean_is_taken_out_behind_the_mask(small_model, monkeypatch):
    finding = forms.equal_under_dropout(model=small_model)
    assert finding.holds, finding.number
    # With nothing dropped both ways are equal; and without the mean taken out neither is.
    assert not forms.equal_under_dropout(model=small_model, rate=0.0).holds
    monkeypatch.setattr(forms.nn, "Dropout", forms.nn.Dense)
    assert not forms.equal_under_dropout(model=small_model).holds


def test_forms_with_a_mean_are_not(small_model, uncentred):
    assert not forms.lossless("pre_rmsnorm", model=small_model).holds
    assert not forms.lossless("pre_crmsnorm", model=small_model).holds
    assert not forms.norm_formula(model=small_model).holds
    assert not forms.mean_in_bfloat16(model=small_model).holds


# ---- Training.


@pytest.fixture
def short(tmp_path):
    """Keys of a run of six steps over random tokens."""
    training.trained_signal.cache_clear()
    training.pre_ln_losses.cache_clear()
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 4000).astype(np.uint16))
    data = (f"data.files=[{tmp_path}/tokens.npy]", "data.source=tokens", "data.validation_fraction=0")
    length = (
        "model.num_layers=2",
        "train.steps=6",
        "train.batch_size=2",
        "train.seq_len=8",
        "optimizer.warmup_steps=0",
    )
    return (*TINY, *data, *length, "train.watch_sequences=2", "model.tie_embeddings=true")


@pytest.mark.parametrize("form", others_are_long(["pre_rmsnorm", "pre_crmsnorm"], ["pre_crmsnorm"]))
def test_training_curves_of_forms_are_equal_and_those_of_converted_parameters_are_not(form, short):
    assert training.equal_curves(form, dtype="float64", arguments=short).holds
    assert training.another_trajectory("pre_rmsnorm", arguments=short).holds


def test_a_conversion_that_leaves_the_mean_in_trains_otherwise(short, uncentred):
    assert training.equal_curves("pre_rmsnorm", dtype="float32", arguments=short).verdict == "did not hold"


def test_what_is_trained_is_watched_and_compared(short):
    hybrid = training.trained_signal("hybrid", short)
    assert hybrid.measures["gradient/block"].shape == (2,)
    one = training.above_baseline("attention_entropy", scheme="hybrid", baseline="pre", sign=1, arguments=short)
    other = training.above_baseline("attention_entropy", scheme="pre", baseline="hybrid", sign=1, arguments=short)
    assert {one.verdict, other.verdict} == {"held", "did not hold"}
    assert training.checked("hybrid", "stream_gradient", arguments=short).holds  # two blocks are not far apart
    assert not training.checked("pre", "gradient/block", scheme="hybrid", arguments=short).holds


# ---- Times.


def test_a_median_lies_between_order_statistics_that_coins_choose():
    """Of 10 fair coins at most 1 shows heads with 11/1024 and at most 2 with 56/1024, more than 2.5 %."""
    assert speed.median_interval(np.arange(10.0)[::-1]) == (1, 8)
    assert speed.median_interval(np.arange(3.0)) == (0, 2)
    rng = np.random.default_rng(0)
    within = [speed.median_interval(sample) for sample in rng.exponential(size=(2000, 25))]
    covered = np.mean([lower <= math.log(2) <= upper for lower, upper in within])
    assert 0.945 < covered < 0.97  # 95.7 % by the binomial of 25


def test_a_time_is_told_where_the_interval_leaves_no_doubt():
    rounds = np.linspace(0.8, 0.96, 9), np.linspace(1.1, 1.3, 9), np.linspace(0.9, 1.1, 9)
    told = [speed.told("x", ratios, limit=1.0) for ratios in rounds]
    assert [each.verdict for each in told] == ["held", "did not hold", "cannot be told here"]
    assert told[0].number == "time of x: median 0.880 (0.820 to 0.940)"
    assert told[2].reason == "1 lies within the 95 % interval of the median"


def test_a_slower_step_is_noticed():
    def step(seconds):
        def wait():
            time.sleep(seconds)
            return jnp.zeros(())

        return wait

    ratios = speed.in_turns({"none": step(0.01), "slow": step(0.02)}, "none", rounds=6)
    assert speed.told("slow", ratios["slow"], limit=1.0).verdict == "did not hold"


@pytest.mark.long
def test_steps_and_forward_passes_are_timed(short):
    sizes = (*short, "train.steps=1")
    assert (
        set(speed.training_ratios(1, sizes))
        == set(speed.forward_ratios(1, sizes))
        == {"none", "pre_rmsnorm", "pre_crmsnorm"}
    )
    assert "span / pre" in speed.as_fast(scheme="span", baseline="pre", rounds=1, arguments=sizes).number


# ---- The command.


@pytest.fixture
def planted(monkeypatch):
    """Every measure finds the same, at once."""
    found = Finding(number="0.5 of 1", holds=False)
    monkeypatch.setattr(measures, "MEASURES", dict.fromkeys(measures.MEASURES, lambda: found))


def test_the_command_prints_a_row_for_each_and_writes_json(planted, tmp_path, capsys):
    assert main(["lab", "claims", "theorem-2", "hybrid-7b", "theorem-2", f"out={tmp_path}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:2]] == ["claim", "theorem-2"]
    assert told[1].endswith("did not hold        0.5 of 1")
    assert "    hybridnorm train 7b model.scheme=pre 'data.files=[tokens/*.npy]'" in told
    written = json.loads((tmp_path / "claims.json").read_text())
    assert [each["id"] for each in written["claims"]] == ["theorem-2", "hybrid-7b"]
    measured, known = written["claims"]
    assert (measured["verdict"], measured["number"], measured["reason"]) == ("did not hold", "0.5 of 1", "")
    assert len(measured["date"]) == 10
    assert "cpu" in measured["machine"]
    assert known["verdict"] == "cannot be told here"
    assert known["date"] == ""


def test_without_ids_it_measures_all_cheap_claims(planted, tmp_path, capsys):
    assert main(["lab", "claims", f"out={tmp_path}"]) == 0
    written = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert {each["id"] for each in written} == set(read_claims())
    assert [each["id"] for each in written if each["verdict"] == "did not hold" and each["cheap"]] == list(
        measures.MEASURES
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("theorem2", "theorem2: no such claim; did you mean 'theorem-2'?"),
        ("model.d_model=3", "model.d_model=3: "),
        ("ot=x", "ot=x: no such key; did you mean 'out'?"),
        ("out=", "out='': must name a directory"),
        ("out=/proc/nowhere", "/proc/nowhere: No such file or directory"),
    ],
)
def test_wrong_arguments_end_in_one_line(argument, message, capsys):
    assert main(["lab", "claims", argument]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.strip().splitlines()) == 1
