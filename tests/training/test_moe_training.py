"""Training a mixture of experts: the losses of its routers, balance, accumulation, and every placement."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bitwise import assert_bitwise
from document_runs import write_documents

import hybridnorm_jax as hn
from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, RunSection, TrainSection
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.moe import RouterStatistics
from hybridnorm_jax.model.watched_streams import ROUTER
from hybridnorm_jax.training import loop
from hybridnorm_jax.training import router_balance as routing
from hybridnorm_jax.training.optimizers.decay import decay_mask
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import model_flops_per_token
from tests.schemes import keys_of

BATCH, SEQ = 8, 16
MOE = {"num_experts": 8, "experts_per_token": 2, "mlp_dim": 16}


def _config(small_config, *, model=None, train=None, optimizer=None, **sections):
    train = {"batch_size": BATCH, "seq_len": SEQ, "steps": 20} | (train or {})
    optimizer = {"learning_rate": 3e-3, "schedule": "constant"} | (optimizer or {})
    return RunConfig(
        model=small_config(**(MOE | (model or {}))),
        train=TrainSection(**train),
        optimizer=OptimizerSection(**optimizer),
        mesh=MeshSection(data=1),
        **sections,
    )


def _batch(microbatches=1):
    """Sequences that count upwards from a random start; rows have unequal numbers of targets."""
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 61, (BATCH, 1)) + np.arange(SEQ + 1)) % 61
    weights = (np.arange(SEQ) < rng.integers(1, SEQ + 1, (BATCH, 1))).astype(np.float32)
    flat = {"tokens": stream[:, :-1].astype(np.int32), "targets": stream[:, 1:].astype(np.int32), "weights": weights}
    return {name: array.reshape(microbatches, BATCH // microbatches, SEQ) for name, array in flat.items()}


pytestmark = pytest.mark.usefixtures("shared_programs")


def _program(config):
    return Program(config, make_mesh(config.mesh.sizes, jax.devices()[:1]))


def _run(config, steps, batch, change=lambda state: state):
    program = _program(config)
    state, history = change(program.fresh_state()), []
    for _ in range(steps):
        state, metrics = program.train_step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


# hybrid_star trains in the tests of balance; these two stand for the other residuals, the rest are slow. span, whose
# layers differ, is long: mix_ln's do, too.
SCHEMES = {"span": pytest.mark.long, "parallel": ()}


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(name, marks=SCHEMES.get(name, pytest.mark.slow))
        for name in sorted(hn.SCHEMES)
        if not (hn.SCHEMES[name].block(1, 4).normalizes_hidden or hn.SCHEMES[name].sphere)
    ],
)
def test_every_scheme_trains(scheme, small_config):
    config = _config(small_config, model={**keys_of(scheme), "num_layers": 4})
    _, history = _run(config, 20, _batch())
    losses = [metrics["loss"] for metrics in history]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_gradient_is_that_of_the_loss_as_documented(microbatches, small_config):
    """Against jax.grad of a loss written out here: each microbatch's router losses, weighted by its targets."""
    train = {"balance_loss": 0.3, "router_z_loss": 0.2, "z_loss": 1e-2, "grad_accumulation": microbatches}
    config = _config(small_config, model={"scheme": "mix_ln", "num_layers": 4}, train=train, optimizer={"clip": None})
    program, batch = _program(config), _batch(microbatches)
    before = jax.device_get(program.fresh_state().params)
    _, metrics = program.train_step(program.fresh_state(), batch)

    def sums(params, tokens, targets, weights):
        logits, sown = hn.Decoder(config.model).apply({"params": params}, tokens, mutable=[ROUTER])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        routers = [run["feed_forward"]["statistics"][0] for run in sown[ROUTER].values()]
        return {
            "nll": (weights * nll).sum(),
            "z": (weights * jax.nn.logsumexp(logits, -1) ** 2).sum(),
            "weight": weights.sum(),
            "balance": weights.sum() * sum(router.balance_loss.sum() for router in routers),
            "router_z": weights.sum() * sum(router.z_loss.sum() for router in routers),
        }

    def total(params):
        each = jax.lax.map(lambda part: sums(params, **part), batch)
        whole = {name: value.sum() for name, value in each.items()}
        means = {name: value / whole["weight"] for name, value in whole.items()}
        loss = means["nll"] + 1e-2 * means["z"] + 0.3 * means["balance"] + 0.2 * means["router_z"]
        return loss, means

    @jax.jit
    def norm_and_means(params):
        grads, means = jax.grad(total, has_aux=True)(params)
        return optax.tree.norm(grads), means

    norm, means = norm_and_means(before)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], means["nll"], rtol=1e-6)
    np.testing.assert_allclose(metrics["balance_loss"], 0.3 * means["balance"], rtol=1e-6)
    np.testing.assert_allclose(metrics["router_balance"], means["balance"] / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["router_z_loss"], 0.2 * means["router_z"], rtol=1e-6)


def _skewed(state):
    """Routers, all of which send every token to experts 0 and 1: their columns read what all tokens have in common."""
    params = state.params
    for name in ("run_0", "run_1"):
        router = params[name]["feed_forward"]["router"]
        router["bias"] = router["bias"] + jnp.asarray([2.0, 1.5, 0, 0, 0, 0, 0, 0])
    return dataclasses.replace(state, params=params)


@pytest.mark.long
@pytest.mark.parametrize("by", ["loss", "bias"])
def test_balance_improves_in_100_steps_from_a_skewed_start(by, small_config):
    def skewed(balance_loss, rate):
        train = {"balance_loss": balance_loss, "router_z_loss": 0.0}
        model = {"mlp_bias": True, "balance_bias": True}
        return _config(small_config, model=model, train=train, optimizer={"balance_bias_rate": rate})

    config = skewed(0.1, 0.0) if by == "loss" else skewed(0.0, 0.02)
    _, history = _run(config, 100, _batch(), _skewed)
    first, last = history[0], history[-1]
    assert first["largest_load"] > 3.5  # of 4
    assert last["largest_load"] < 2.0
    assert np.abs(last["expert_fraction"] - 1 / 8).max() < np.abs(first["expert_fraction"] - 1 / 8).max() / 3
    _, unaided = _run(skewed(0.0, 0.0), 100, _batch(), _skewed)
    assert unaided[-1]["largest_load"] > last["largest_load"] + 0.5


def _with_balance_bias(small_config):
    return _config(small_config, model={"balance_bias": True}, optimizer={"balance_bias_rate": 0.01})


def test_the_balance_bias_moves_by_its_own_rule_alone(small_config):
    config = _with_balance_bias(small_config)
    state, history = _run(config, 1, _batch())
    fraction = history[0]["expert_fraction"]
    biases = np.concatenate([state.params[run]["feed_forward"]["balance_bias"] for run in ("run_0", "run_1")])
    np.testing.assert_allclose(biases, 0.01 * np.sign(1 / 8 - fraction), rtol=1e-6)
    assert (np.abs(biases) > 0).any()
    assert decay_mask(config.optimizer, state.params)["run_0"]["feed_forward"]["balance_bias"] is False
    moments = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state.opt_state)
        if "balance_bias" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 4
    assert not any(np.any(leaf) for leaf in moments)


def test_biases_of_many_runs_meet_the_fractions_of_their_layers():
    """More than ten runs: run_10 comes after run_9."""
    params = {f"run_{number}": {"feed_forward": {"balance_bias": jnp.zeros((1, 2))}} for number in range(12)}
    fraction = jnp.where(jnp.arange(12)[:, None] == 10, jnp.asarray([0.9, 0.1]), 0.5)
    moved = routing.move_balance_biases(params, fraction, 0.5)
    for number in range(12):
        expected = [[-0.5, 0.5]] if number == 10 else [[0, 0]]
        np.testing.assert_array_equal(moved[f"run_{number}"]["feed_forward"]["balance_bias"], expected)


def test_metrics_of_two_layers_by_hand():
    fraction = jnp.asarray([[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    routers = RouterStatistics(jnp.asarray([2.0, 1.0]), jnp.asarray([3.0, 5.0]), jnp.asarray([0.2, 0.6]), fraction)
    metrics = routing.router_metrics(routers, balance=0.1, z=0.01)
    expected = {"balance_loss": 0.3, "router_z_loss": 0.08, "router_balance": 1.5, "router_entropy": 0.4}
    expected["largest_load"] = 2.0
    assert metrics.pop("expert_fraction") is fraction
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == expected


def test_flops_are_those_of_what_a_token_passes(small_config):
    config = small_config(**MOE, shared_experts=1, num_kv_heads=4)
    attention = 4 * 32 * 32
    feed_forward = 32 * 8 + (2 + 1) * 3 * 32 * 16
    weights = 3 * (attention + feed_forward) + 32 * 61
    assert model_flops_per_token(config, 10) == 6 * weights + 12 * 3 * 32 * 10 / 2


def test_a_batch_without_any_target_keeps_everything_finite(small_config):
    batch = _batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    state, history = _run(_with_balance_bias(small_config), 1, batch)
    assert history[0]["loss"] == 0
    assert history[0]["grad_norm"] == 0
    assert not np.any(state.params["run_1"]["feed_forward"]["balance_bias"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.fixture
def text_config(tmp_path, small_config):
    """A run on a few short documents."""
    write_documents(tmp_path)
    default = RunConfig()
    data = {"source": "text", "files": (str(tmp_path / "*.txt"),), "cache_dir": str(tmp_path / "cache")}
    config = _config(
        small_config,
        model={"scheme": "hybrid", "num_layers": 2, "vocab_size": 257}
        | {"balance_bias": True, "shared_experts": 1, "mlp_bias": True},
        train={"steps": 6, "grad_accumulation": 2, "log_every": 1},
        run=RunSection(name="moe", dir=str(tmp_path / "runs")),
        data=dataclasses.replace(default.data, validation_fraction=0.2, **data),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
        eval=dataclasses.replace(default.eval, every=6, batches=1),
    )
    return dataclasses.replace(config, mesh=MeshSection(data=2, fsdp=1, expert=2, tensor=2))


class _KilledError(Exception):
    """Stands for a process that ends without a word."""


@pytest.mark.long
def test_resumes_bit_for_bit(text_config, tmp_path, monkeypatch, capsys):
    whole = dataclasses.replace(text_config, run=dataclasses.replace(text_config.run, name="whole"))
    loop.train(whole)
    params = Program(text_config).abstract_state.params
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    active = total - 2 * 6 * (3 * 32 * 16 + 2 * 16 + 32)  # layers, absent experts, their kernels and biases
    dispatch = "dispatch blocked, chosen by model.expert_dispatch=auto"
    line = f"experts 8, 2 per token and 1 shared, width 16; {active:,} parameters active; {dispatch}"
    assert line in " ".join(capsys.readouterr().out.split())
    step, taken = Program.train_step, []

    def dies_in_step_four(self, state, batch):
        taken.append(batch)
        if len(taken) == 4:
            raise _KilledError
        return step(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "train_step", dies_in_step_four)
        with pytest.raises(_KilledError):
            loop.train(text_config)
    loop.train(text_config)
    program = Program(text_config)
    ours, expected = (loop.Checkpoints(tmp_path / "runs" / name / "checkpoints", keep=10) for name in ("moe", "whole"))
    with ours, expected:
        left, right = ours.restore(program.abstract_state), expected.restore(program.abstract_state)
    assert_bitwise(left[0], right[0])
    assert np.any(left[0].params["run_0"]["feed_forward"]["balance_bias"])

    # Elsewhere than where it was trained: mesh.expert is not kept.
    scores = evaluate_run(
        str(tmp_path / "runs/moe"), ["mesh.fsdp=4", "mesh.tensor=2", "eval.batches=1"], progress=False
    )
    assert np.isfinite(scores.scores["validation"].loss)

    def records(name):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        timing = ("tokens_per_second", "mfu", "time/")
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines]

    assert records("moe") == records("whole")
    logged = records("moe")[0]
    assert np.shape(logged["train/expert_fraction"]) == (2, 8)
    names = {"train/balance_loss", "train/router_z_loss", "train/router_entropy", "train/largest_load"}
    assert names <= logged.keys()
