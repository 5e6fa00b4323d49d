"""Training a Pre-LN model through its cheaper forms: the same curve and the same parameters; invariants in the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.equivalence import conversion_of, decoder_forms, transforms
from hybridnorm_jax.equivalence.invariants import InvariantError
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model import block, decoder
from hybridnorm_jax.training import program as program_module
from hybridnorm_jax.training.program import Program

BATCH, SEQ = 8, 12
PRE_LN = {"scheme": "pre", "norm": "layernorm", "norm_bias": True, "tie_embeddings": True, "num_layers": 2}

NORM_OF_TOKENS_AND_POSITIONS = {"embedding_norm": "true", "positions": "learned", "max_positions": SEQ}


def _config(small_config, form="none", *, model=None, mesh=None, **train):
    optimizer = OptimizerSection(learning_rate=3e-3, weight_decay=0.1, clip=0.5, schedule="cosine")
    return RunConfig(
        model=small_config(**(PRE_LN | (model or {}))),
        train=TrainSection(batch_size=BATCH, seq_len=SEQ, steps=50, equivalent_form=form, **train),
        optimizer=optimizer,
        mesh=mesh or MeshSection(),
    )


def _batch(microbatches=1):
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 61, (BATCH, 1)) + np.arange(SEQ + 1)) % 61
    flat = {"tokens": stream[:, :-1].astype(np.int32), "targets": stream[:, 1:].astype(np.int32)}
    flat["weights"] = (np.arange(SEQ) < rng.integers(1, SEQ + 1, (BATCH, 1))).astype(np.float32)
    return {name: array.reshape(microbatches, BATCH // microbatches, SEQ) for name, array in flat.items()}


def _run(config, steps, *, microbatches=1, mesh=None):
    """(final parameters, losses) on one device, or on the mesh that the config asks for."""
    if mesh is None:
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    program = Program(config, mesh)
    state, losses = program.fresh_state(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, _batch(microbatches))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


def _largest_difference(ours, theirs):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)))


@pytest.mark.long
def test_fifty_steps_of_adamw_arrive_at_the_same_parameters(small_config):
    """Clipping and decay included; float64, so that only mathematics can differ."""
    with jax.enable_x64(True):
        model = {"dtype": "float64", "param_dtype": "float64"}
        expected, losses = _run(_config(small_config, model=model), 50)
        assert losses[-1] < 0.3 * losses[0]
        for form, pad_to in (("pre_rmsnorm", 1), ("pre_crmsnorm", 1), ("pre_crmsnorm", 16)):
            config = _config(small_config, form, model=model, equivalent_pad_to=pad_to, check_invariants=pad_to > 1)
            found, curve = _run(config, 50)
            np.testing.assert_allclose(curve, losses, rtol=1e-8)
            assert _largest_difference(found, expected) < 1e-8


@pytest.mark.long
def test_a_model_with_a_norm_of_tokens_and_positions_trains_the_same(small_config):
    """Of which the cheaper forms subtract a mean. Invariants are checked on the way."""
    with jax.enable_x64(True):
        model = {"dtype": "float64", "param_dtype": "float64", **NORM_OF_TOKENS_AND_POSITIONS}
        expected, losses = _run(_config(small_config, model=model), 4)
        for form in ("pre_rmsnorm", "pre_crmsnorm"):
            found, curve = _run(_config(small_config, form, model=model, check_invariants=True), 4)
            np.testing.assert_allclose(curve, losses, rtol=1e-10)
            assert _largest_difference(found, expected) < 1e-9


@pytest.mark.long
def test_training_the_cheaper_parameters_themselves_is_another_trajectory(small_config):
    """So the equality above is not for want of sensitivity."""
    with jax.enable_x64(True):
        model = {"dtype": "float64", "param_dtype": "float64"}
        config = _config(small_config, model=model)
        program = Program(config, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
        conversion = conversion_of(config.model, "pre_rmsnorm")
        direct = Program(dataclasses.replace(config, model=conversion.config), program.mesh)
        state = program.fresh_state()
        theirs = conversion.convert(jax.device_get(state.params))
        theirs = dataclasses.replace(direct.fresh_state(), params=theirs)
        for _ in range(3):
            state, metrics = program.train_step(state, _batch())
            theirs, other = direct.train_step(theirs, _batch())
        assert abs(float(metrics["loss"]) - float(other["loss"])) > 1e-4


@pytest.mark.parametrize(
    ("form", "pad_to", "model"),
    [("pre_crmsnorm", 1, {}), ("pre_crmsnorm", 16, {}), ("pre_crmsnorm", 1, NORM_OF_TOKENS_AND_POSITIONS)],
)
@pytest.mark.long
def test_forms_train_the_same_sharded_and_accumulated(form, pad_to, model, small_config):
    """Width 31 is divided by no mesh axis. Invariants are checked on the way."""
    _, losses = _run(_config(small_config, model=model), 3)
    mesh = MeshSection(1, 4, 2)
    config = _config(small_config, form, model=model, mesh=mesh, equivalent_pad_to=pad_to, check_invariants=True)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accumulation=2, loss_chunk=4))
    _, sharded = _run(config, 3, microbatches=2, mesh=make_mesh({"data": 1, "fsdp": 4, "tensor": 2}))
    np.testing.assert_allclose(sharded, losses, rtol=3e-6)


def _recentring_one_kernel_along_its_input(params, layout):
    centred = transforms.recenter(params, layout)
    kernel = params["run_0"]["feed_forward"]["down"]["kernel"]
    centred["run_0"]["feed_forward"]["down"]["kernel"] = kernel - kernel.mean(1, keepdims=True)
    return centred


@pytest.mark.parametrize("form", others_are_long(["none", "pre_rmsnorm", "pre_crmsnorm"], ["pre_crmsnorm"]))
def test_a_bug_planted_in_a_training_step_stops_the_run(form, small_config, monkeypatch):
    monkeypatch.setattr(decoder_forms, "recenter", _recentring_one_kernel_along_its_input)
    with pytest.raises(InvariantError) as error:
        _run(_config(small_config, form, check_invariants=True), 1)
    assert "step 1: run_0/feed_forward/down/kernel is not centred: " in str(error.value)
    assert "\n" not in str(error.value)
    # Without the checks nobody notices.
    _run(_config(small_config, form), 1)


def test_the_training_forward_pass_itself_is_measured(small_config, monkeypatch):
    """With the other measurements left out, the mean that the gradient's own forward pass sows stops the run."""
    monkeypatch.setattr(decoder_forms, "recenter", _recentring_one_kernel_along_its_input)
    monkeypatch.setattr(program_module, "compare_forms", lambda *args, **kwargs: Measured())
    with pytest.raises(
        InvariantError, match=r"step 1, after block [12] .*: the stream of the training forward pass is"
    ):
        _run(_config(small_config, "pre_rmsnorm", check_invariants=True, grad_accumulation=2), 1, microbatches=2)


def test_nan_in_any_sequence_stops_the_run(small_config, monkeypatch):
    """The comparison of forms reads the first sequence alone; the training forward pass reads all."""
    batch = _batch()
    batch["tokens"][0] %= 60
    batch["tokens"][0, 5, 3] = 60
    config = _config(small_config, "pre_rmsnorm", model={"tie_embeddings": False}, check_invariants=True)
    program = Program(config, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    state = program.fresh_state()
    table = state.params["token_embedding"]["embedding"].at[60].set(jnp.nan)
    state = dataclasses.replace(state, params=state.params | {"token_embedding": {"embedding": table}})
    with pytest.raises(InvariantError, match=r"step 1: token_embedding/embedding is not centred: .* is nan"):
        program.train_step(state, batch)


def test_padding_that_is_not_zero_stops_the_run(small_config, monkeypatch):
    def noisy(params, layout, *, pad_to):
        stored = transforms.compress(params, layout, pad_to=pad_to)
        kernel = stored["run_0"]["attention"]["out"]["kernel"]
        stored["run_0"]["attention"]["out"]["kernel"] = kernel.at[..., -1].set(0.1)
        return stored

    monkeypatch.setattr(decoder_forms, "compress", noisy)
    monkeypatch.setattr(program_module, "compare_forms", lambda *args, **kwargs: Measured())
    config = _config(small_config, "pre_crmsnorm", equivalent_pad_to=16, check_invariants=True)
    with pytest.raises(InvariantError, match=r"step 1, after block [12] .*: the stream of the training forward pass"):
        _run(config, 1)


def test_checks_that_are_off_cost_nothing(small_config, monkeypatch):
    """The step lowers to the same program as one whose blocks have no checks at all."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with_hooks = Program(_config(small_config, "pre_rmsnorm"), mesh).lower_train_step().as_text()
    for module in (block, decoder):
        monkeypatch.setattr(module, "watch_streams", lambda module, streams: streams)
    assert Program(_config(small_config, "pre_rmsnorm"), mesh).lower_train_step().as_text() == with_hooks


def test_crmsnorm_from_scratch_at_full_width_trains(small_config, monkeypatch):
    model = {"norm": "crmsnorm", "norm_bias": False, "scheme": "pre"}
    config = _config(small_config, model=model, check_invariants=True)
    _, losses = _run(config, 30)
    assert losses[-1] < 0.5 * losses[0]

    def wrong(x, scale=None, bias=None, *, eps, width=None):
        return widened(x) * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)

    monkeypatch.setattr("hybridnorm_jax.equivalence.measurements.crms_norm", wrong)
    with pytest.raises(InvariantError, match=r"CRMSNorm's difference from RMSNorm of the full stream"):
        _run(config, 1)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"scheme": "post"}, {"form": "pre_rmsnorm"}, r"equivalent_form=pre_rmsnorm: model\.scheme=post: a post norm"),
        ({"norm": "rmsnorm"}, {"form": "pre_crmsnorm"}, r"equivalent_form=pre_crmsnorm: model\.norm=rmsnorm"),
        ({"dropout": 0.1}, {"form": "pre_rmsnorm"}, r"model\.dropout=0\.1: dropout at the end of a branch undoes"),
        ({}, {"form": "pre_rmsnorm", "equivalent_pad_to": 16}, r"equivalent_pad_to=16: only for pre_crmsnorm"),
        ({}, {"form": "pre_crms"}, r"equivalent_form=pre_crms: not known; did you mean 'pre_crmsnorm'"),
        ({"scheme": "span", "norm": "rmsnorm"}, {"check_invariants": True}, r"check_invariants=true: model\.norm=rms"),
    ],
    ids=str,
)
def test_what_has_no_such_form_is_refused_before_anything_runs(model, train, message, small_config):
    with pytest.raises(ConfigError, match=message) as error:
        _config(small_config, model=model, **train)
    assert "\n" not in str(error.value)
