"""The equivalences on mixtures of experts: the same function in float64, and what is compared where experts tie."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compared_models import logits
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence as eq
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.run_config import OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.equivalence import comparison, decoder_forms, proof, transforms
from hybridnorm_jax.equivalence.comparison import compare_forms
from hybridnorm_jax.equivalence.expert_choices import compare_routing
from hybridnorm_jax.equivalence.invariants import InvariantError, assert_measured, tolerances
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES
from hybridnorm_jax.training.program import Program

EXPERTS = {"num_experts": 6, "experts_per_token": 2, "mlp_dim": 16, "norm": "layernorm"}
MODELS = {
    "plain": {"scheme": "pre"},
    "everything": {
        "scheme": "pre",
        "norm_bias": True,
        "mlp_bias": True,
        "shared_experts": 2,
        "balance_bias": True,
        "tie_embeddings": True,
        "normalize_expert_weights": True,
    },
    "bias_of_the_norm_alone": {"scheme": "pre", "norm_bias": True, "shared_experts": 1},
    "mlp_bias_alone": {"scheme": "pre", "mlp_bias": True, "balance_bias": True},
    "bare_norms_tied": {"scheme": "pre", "norm_scale": False, "tie_embeddings": True, "shared_experts": 1},
    "parallel": {"scheme": "parallel", "norm_bias": True, "balance_bias": True},
    "input_scales": {"scheme": "layernorm_scaling", "norm_bias": True, "shared_experts": 1},
    "olmoe": {"scheme": "pre_qk_projection", "norm_bias": True, "experts_per_token": 3},
}
FORMS = (("pre_rmsnorm", 1), ("pre_crmsnorm", 1), ("pre_crmsnorm", 24))


def _model(small_config, random_params, keys, dtype="float64"):
    config = small_config(**(EXPERTS | keys), dtype=dtype, param_dtype=dtype)
    return config, random_params(config)


# Those with most to fold: biases and shared experts; no scales, and a tied head; one branch beside the other.
CASES = [(name, *form) for name in MODELS for form in FORMS]
QUICK = [("everything", *form) for form in FORMS]
QUICK += [("bare_norms_tied", "pre_crmsnorm", 1), ("parallel", "pre_crmsnorm", 24)]


@pytest.mark.parametrize("case", others_are_long(CASES, QUICK), ids=lambda case: "-".join(map(str, case)))
def test_all_forms_compute_the_same_logits(case, small_config, random_params, tokens):
    name, form, pad_to = case
    with jax.enable_x64(True):
        config, params = _model(small_config, random_params, MODELS[name])
        expected = logits(config, params, tokens)
        conversion = eq.conversion_of(config, form, pad_to=pad_to)
        converted = conversion.convert(params)
        found = logits(conversion.config, converted, tokens)
        assert float(abs(found - expected).max() / abs(expected).max()) < 1e-12
        if config.balance_bias:
            ours, theirs = (tree["run_0"]["feed_forward"]["balance_bias"] for tree in (converted, params))
            assert abs(theirs).min() > 0
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("form", others_are_long(FORMS, FORMS[2:]), ids=lambda form: f"{form[0]}-{form[1]}")
@pytest.mark.parametrize(
    "name",
    [
        "everything",
        pytest.param("input_scales", marks=pytest.mark.slow),
        pytest.param("parallel", marks=pytest.mark.slow),
    ],
)
def test_gradients_with_respect_to_theta_are_equal(name, form, small_config, random_params, tokens):
    with jax.enable_x64(True):
        config, params = _model(small_config, random_params, MODELS[name])
        direction = np.random.default_rng(3).standard_normal((2, 12, 61))

        def loss(config, convert):
            return lambda theta: (hn.Decoder(config).apply({"params": convert(theta)}, tokens) * direction).sum()

        expected = jax.jit(jax.grad(loss(config, lambda theta: theta)))(params)
        conversion = eq.conversion_of(config, form[0], pad_to=form[1])
        found = jax.jit(jax.grad(loss(conversion.config, conversion.convert)))(params)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            # A key's and the balance bias have gradient zero, and rounding in both; others are above 1.
            size = max(np.linalg.norm(theirs), 1.0)
            assert np.linalg.norm(ours - theirs) / size < 1e-11, jax.tree_util.keystr(path)


def test_decompression_is_the_way_back(small_config, random_params, tokens):
    with jax.enable_x64(True):
        config, params = _model(small_config, random_params, MODELS["everything"])
        full, centred = eq.to_pre_rmsnorm(config, params)
        layout = eq.decoder_layout(full)
        stored = eq.compress(centred, layout, pad_to=16)
        back = eq.decompress(stored, layout, width=32)
        assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, centred)
        jax.tree.map(np.testing.assert_array_equal, eq.compress(back, layout, pad_to=16), stored)
        np.testing.assert_allclose(logits(full, back, tokens), logits(config, params, tokens), rtol=0, atol=1e-11)


# ---- Where two forms are compared.


def _tied(params):
    """Experts 2 and 3 of the middle layer get routers that differ in the last bits."""
    layer = params["run_0"]["feed_forward"]
    kernel = layer["router"]["kernel"] = layer["router"]["kernel"].copy()
    noise = 1 + 1e-7 * np.random.default_rng(5).standard_normal(kernel.shape[1]).astype(np.float32)
    kernel[1, :, 3] = kernel[1, :, 2] * noise
    if "balance_bias" in layer:
        layer["balance_bias"] = layer["balance_bias"].copy()
        layer["balance_bias"][1, 2:4] = 0.5  # chosen often


def test_ties_are_no_alarm_and_what_they_do_not_reach_is_compared(small_config, random_params):
    config, params = _model(small_config, random_params, {"scheme": "pre", "experts_per_token": 1}, "float32")
    _tied(params)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 24)).astype(np.int32)
    measured = jax.jit(lambda p: compare_forms(config, p, tokens))(params)
    assert_measured(1, measured, tolerances(config))
    assert measured.left_out[0] == measured.left_out[1] == 0
    assert 0 < measured.left_out[2] < 0.5
    assert measured.left_out[2] < measured.left_out[3]
    assert 0 < measured.ties[1] < 1e-6


def test_without_leaving_out_ties_would_be_an_alarm(small_config, random_params, monkeypatch):
    """So the test above has something to excuse."""
    config, params = _model(small_config, random_params, {"scheme": "pre", "experts_per_token": 1}, "float32")
    _tied(params)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 24)).astype(np.int32)

    def nothing_left_out(*args):
        found = compare_routing(*args)
        return found.replace(left_out=jnp.zeros_like(found.left_out))

    monkeypatch.setattr(comparison, "compare_routing", nothing_left_out)
    measured = jax.jit(lambda p: compare_forms(config, p, tokens))(params)
    with pytest.raises(InvariantError, match=r"step 1, after block [23] .*: the stored stream's difference"):
        assert_measured(1, measured, tolerances(config))


def test_dense_models_measure_no_routing(small_config, random_params, tokens):
    config = small_config(scheme="pre", norm="layernorm")
    measured = jax.eval_shape(lambda params: compare_forms(config, params, tokens), random_params(config))
    found = {field.name for field in dataclasses.fields(measured) if getattr(measured, field.name) is not None}
    assert found == {"leaves", "stream", "stored", "last", "norm", "logits"}


# ---- Planted errors: each is caught, by every measurement that it must show in.


def _uncentred(monkeypatch):
    def recenter(params, layout):
        centred = transforms.recenter(params, layout)
        kernel = params["run_0"]["feed_forward"]["expert_down"]["kernel"]
        centred["run_0"]["feed_forward"]["expert_down"]["kernel"] = kernel
        return centred

    monkeypatch.setattr(decoder_forms, "recenter", recenter)


def _cut(*leaf):
    """compress with this reader's last row dropped, but not subtracted from the others."""

    def plant(monkeypatch):
        def compress(params, layout, *, pad_to):
            stored = transforms.compress(params, layout, pad_to=pad_to)
            tree, whole = stored["run_0"]["feed_forward"], params["run_0"]["feed_forward"]
            for name in leaf:
                tree, whole = tree[name], whole[name]
            tree["kernel"] = whole["kernel"][..., :-1, :]
            return stored

        monkeypatch.setattr(decoder_forms, "compress", compress)

    return plant


def _without_balance_bias(monkeypatch):
    def fold(params, layout):
        folded = transforms.fold_affine(params, layout)
        layer = folded["run_0"]["feed_forward"]
        layer["balance_bias"] = jnp.zeros_like(layer["balance_bias"])
        return folded

    monkeypatch.setattr(decoder_forms, "fold_affine", fold)


SPOILT = {"scheme": "pre", "shared_experts": 1, "balance_bias": True}


def test_there_is_no_alarm_before_an_error_is_planted(small_config, random_params, tokens):
    config, params = _model(small_config, random_params, SPOILT, "float32")
    assert_measured(7, jax.jit(lambda p: compare_forms(config, p, tokens))(params), tolerances(config))


@pytest.mark.parametrize(
    ("plant", "message", "seen_in"),
    [
        (
            _uncentred,
            r"step 7: run_0/feed_forward/expert_down/kernel is not centred: ",
            {"stream", "stored", "last", "norm", "routers", "logits"},
        ),
        (
            _cut("router"),
            r"step 7, after block \d .*: the stored stream's diff",
            {"stored", "last", "norm", "routers", "ties"},
        ),
        (
            _cut("expert_up"),
            r"step 7, after block \d .*: the stored stream's diff",
            {"stored", "last", "norm", "routers"},
        ),
        (
            _cut("shared", "gate"),
            r"step 7, after block \d .*: the stored stream",
            {"stored", "last", "norm", "routers"},
        ),
        (_without_balance_bias, r"step 7, in block 1: .* scores do not tie: their gap is \d", {"ties"}),
    ],
    ids=["uncentred", "router", "expert_up", "shared_gate", "balance_bias"],
)
def test_planted_errors_are_caught(plant, message, seen_in, small_config, random_params, tokens, monkeypatch):
    config, params = _model(small_config, random_params, SPOILT, "float32")
    limits = tolerances(config)
    plant(monkeypatch)
    measured = jax.jit(lambda p: compare_forms(config, p, tokens))(params)
    with pytest.raises(InvariantError, match=message):
        assert_measured(7, measured, limits)
    for name in seen_in:
        with pytest.raises(InvariantError):
            assert_measured(7, Measured(**{name: getattr(measured, name)}), limits)


# ---- Training, and the command.


def _program(small_config, form, *, dtype="float64", **train):
    model = small_config(**EXPERTS, **MODELS_TRAINED, dtype=dtype, param_dtype=dtype)
    optimizer = OptimizerSection(learning_rate=3e-3, weight_decay=0.1, clip=0.5, schedule="cosine")
    section = TrainSection(batch_size=8, seq_len=12, steps=50, equivalent_form=form, **train)
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
    return Program(RunConfig(model=model, train=section, optimizer=optimizer), mesh)


MODELS_TRAINED = {
    "scheme": "pre",
    "norm_bias": True,
    "tie_embeddings": True,
    "num_layers": 2,
    "shared_experts": 1,
    "balance_bias": True,
}


def _batch():
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 61, (8, 1)) + np.arange(13)) % 61
    weights = (np.arange(12) < rng.integers(1, 13, (8, 1))).astype(np.float32)
    batch = {"tokens": stream[:, :-1].astype(np.int32), "targets": stream[:, 1:].astype(np.int32), "weights": weights}
    return {name: array[None] for name, array in batch.items()}


def _train(program, steps):
    state, losses = program.fresh_state(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, _batch())
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@pytest.mark.long
def test_training_through_a_cheaper_form_is_the_pre_ln_run(small_config):
    """AdamW with clipping and decay, in float64, invariants checked on the way."""
    with jax.enable_x64(True):
        expected, losses = _train(_program(small_config, "none"), 10)
        assert losses[-1] < 0.9 * losses[0]
        for form, pad_to in (("pre_rmsnorm", 1), ("pre_crmsnorm", 16)):
            program = _program(small_config, form, equivalent_pad_to=pad_to, check_invariants=True)
            found, curve = _train(program, 10)
            np.testing.assert_allclose(curve, losses, rtol=1e-9)
            gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), found, expected)
            assert max(jax.tree.leaves(gaps)) < 1e-9


@pytest.mark.long
def test_invariants_hold_in_float32_training_and_a_planted_error_stops_it(small_config, monkeypatch):
    _train(_program(small_config, "pre_crmsnorm", dtype="float32", check_invariants=True), 3)
    _uncentred(monkeypatch)
    with pytest.raises(InvariantError, match=r"step 1: run_0/feed_forward/expert_down/kernel is not centred: "):
        _train(_program(small_config, "pre_crmsnorm", dtype="float32", check_invariants=True), 1)


@pytest.fixture
def trained(tmp_path):
    """The directory of a Pre-LN run of two steps, with experts."""
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16))
    arguments = [f"run.dir={tmp_path}/runs", "run.name=moe", "data.source=tokens", f"data.files=[{tokens}]"]
    arguments += ["model.scheme=pre", "model.norm=layernorm", "model.norm_bias=true", "model.d_model=16"]
    arguments += ["model.num_layers=2", "model.num_heads=2", "model.mlp_dim=16", "model.num_experts=4"]
    arguments += ["model.experts_per_token=2", "model.shared_experts=1", "train.steps=2", "train.batch_size=8"]
    arguments += ["train.seq_len=8", "train.sample_tokens=0", "data.validation_fraction=0"]
    assert main(["train", *arguments, f"data.validation.train_all=[{tokens}]"]) == 0
    yield tmp_path / "runs" / "moe"
    jax.config.update("jax_enable_x64", False)  # the command switches it on for its whole process


@pytest.mark.long
def test_the_command_converts_a_run_with_experts_and_says_how_many_choices_differ(trained, capsys, tmp_path):
    capsys.readouterr()
    assert main(["convert", str(trained), str(tmp_path / "stored"), "--form", "pre_crmsnorm"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 experts" in printed
    lines = printed.partition("arithmetic")[2].splitlines()
    assert lines[0].split() == ["max", "mean", "relative", "choices", "tokens", "rest"] * 2
    rows = {line[:12].strip(): line[12:].split() for line in lines[1:5]}
    for name in ("float64", "as written"):
        assert rows[name][3:5] == ["0.00%", "0.0%"]
        assert float(rows[name][0]) == float(rows[name][5]) < 1e-5
    # Eight bits decide some of the 2 x 128 x 2 choices otherwise.
    assert float(rows["bfloat16"][3].rstrip("%")) > 0
    assert float(rows["bfloat16"][4].rstrip("%")) > 0
    assert "where experts' scores tie, rounding decides" in printed
    jax.config.update("jax_enable_x64", False)
    losses = []
    for directory in (trained, tmp_path / "stored"):
        assert main(["eval", str(directory), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sets"]["train_all"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _proven(small_config, random_params, spoil=lambda params: None):
    """The proof for a Pre-CRMSNorm form, whose parameters are written in float32."""
    keys = {"scheme": "pre", "experts_per_token": 1, "balance_bias": True}
    config, params = _model(small_config, random_params, keys, "float32")
    _tied(params)
    conversion = eq.conversion_of(config, "pre_crmsnorm")
    written = proof.cast(conversion.convert(proof.cast(params, "float64")), "float32")
    spoil(written["run_0"]["feed_forward"])
    tokens = np.random.default_rng(1).integers(0, 61, (2, 24)).astype(np.int32)
    return proof.prove(config, params, conversion, written, {"random": tokens})


@pytest.mark.long
def test_a_proof_excuses_ties_of_what_is_written_and_nothing_else(small_config, random_params):
    with jax.enable_x64(True):
        found = _proven(small_config, random_params)
        row = found.logits[proof.WRITTEN, "random"]
        # Rounding to float32 decides ties; the logits differ by much, and only where these reach.
        assert row.relative > 1e-2
        assert row.choices.rest / row.logit < 1e-5
        assert 0 < row.choices.differ < row.choices.left_out < 1
        assert found.holds
        assert "choices" in proof.table(found)

        def balance(layer):
            layer["balance_bias"] = jnp.zeros_like(layer["balance_bias"])

        def router(layer):
            layer["router"]["kernel"] = layer["router"]["kernel"] * 1.001

        for spoil in (balance, router):
            spoilt = _proven(small_config, random_params, spoil)
            assert spoilt.worst("float64") < 1e-12
            assert not spoilt.holds
        spoilt = dataclasses.replace(row, choices=dataclasses.replace(row.choices, left_out=1.0))
        assert spoilt.unexplained == np.inf
        spoilt = dataclasses.replace(row, choices=dataclasses.replace(row.choices, routers=float("nan")))
        assert not dataclasses.replace(found, logits=found.logits | {(proof.WRITTEN, "random"): spoilt}).holds
