"""Devices that share the experts exchange rows in rounds: exact at any imbalance, and in bounded memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from hybridnorm_jax.kernels import exchanged_experts, tpu_visits
from hybridnorm_jax.kernels.expert_dispatch import apply_experts
from hybridnorm_jax.kernels.split_experts import apply_experts_on_mesh
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh

BATCH, SEQ, EMBED, MLP, EXPERTS, K = 8, 5, 6, 10, 8, 2
TOKENS = BATCH * SEQ


def _everywhere(*pair):
    return np.tile(pair, (TOKENS, 1))


def _random(scores):
    noise = np.random.default_rng(3).random((TOKENS, EXPERTS))
    return np.argsort(-(noise + scores), axis=1)[:, :K]


# The experts that each token chooses.
ROUTINGS = {
    "even": np.stack([np.arange(TOKENS) % EXPERTS, (np.arange(TOKENS) + 3) % EXPERTS], axis=1),
    "all at one expert": _everywhere(5),
    "all at two neighbours": _everywhere(5, 4),
    "all at two experts": _everywhere(0, 7),
    "uneven": _random(np.linspace(2, 0, EXPERTS)),
    "experts without tokens": _random(np.where(np.isin(np.arange(EXPERTS), (1, 4, 6)), 9, 0)),
    "each device its own": np.stack([np.arange(TOKENS) // SEQ, (np.arange(TOKENS) // SEQ + 1) % EXPERTS], axis=1),
}


def _inputs(routing, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (
        (TOKENS, EMBED),
        (EXPERTS, EMBED, MLP),
        (EXPERTS, EMBED, MLP),
        (EXPERTS, MLP, EMBED),
        ROUTINGS[routing].shape,
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _both(function):
    """(inputs, chosen experts, d_y) -> (y, the gradients of all inputs)."""

    def both(inputs, chosen, d_y):
        value, pull = jax.vjp(lambda *inputs: function(*inputs, chosen), *inputs)
        return value, *pull(d_y)

    return jax.jit(both)


def _arguments(routing, dtype=np.float64):
    d_y = jnp.asarray(np.random.default_rng(1).standard_normal((TOKENS, EMBED)), dtype)
    return _inputs(routing, dtype), jnp.asarray(ROUTINGS[routing]), d_y


def _dense(x, gate, up, down, weights, chosen):
    return apply_experts(x, ExpertKernels(gate, up, down), weights, chosen, dispatch="dense")


def _on_mesh(dispatch):
    def function(x, gate, up, down, weights, chosen):
        x, weights, chosen = (array.reshape(BATCH, SEQ, -1) for array in (x, weights, chosen))
        y = apply_experts_on_mesh(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=dispatch)
        return y.reshape(TOKENS, -1)

    return function


def _assert_equal(got, expected, tolerance):
    for name, ours, reference in zip(("y", "x", "gate", "up", "down", "weights"), got, expected, strict=True):
        reference = np.asarray(reference)
        atol = tolerance * max(1, np.abs(reference).max())
        np.testing.assert_allclose(ours, reference, rtol=0, atol=atol, err_msg=name)


@functools.cache
def _expected(routing):
    return _both(_dense)(*_arguments(routing))


@functools.cache
def _in_rounds(sizes, length, k):
    """The program of a mesh, in float64: one for every routing of k experts to a token, whatever they are."""
    routing = next(name for name, chosen in ROUTINGS.items() if chosen.shape[1] == k)
    with pytest.MonkeyPatch.context() as patch, use_mesh(make_mesh(dict(sizes), jax.devices()[:8])):
        patch.setattr(exchanged_experts, "round_length", lambda rows, devices: length)
        return _both(_on_mesh("blocked")).lower(*_arguments(routing)).compile()


# A program serves all routings of as many experts to a token, so programs are what `make test` takes fewer of.
PROGRAMS = [({"expert": 8}, 1), ({"expert": 8}, 3), ({"fsdp": 2, "expert": 2, "tensor": 2}, 8)]
RARE = [({"expert": 8}, 8), *(({"fsdp": 2, "expert": 2, "tensor": 2}, length) for length in (1, 3))]


@pytest.mark.parametrize(
    ("mesh", "length"), [*PROGRAMS, *(pytest.param(*case, marks=pytest.mark.long) for case in RARE)], ids=str
)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_number_of_rounds_gives_what_one_device_computes(mesh, routing, length):
    with jax.enable_x64(True):
        got = _in_rounds(tuple(mesh.items()), length, ROUTINGS[routing].shape[1])(*_arguments(routing))
        _assert_equal(got, _expected(routing), 1e-12)


# Rounding errors of 6e-8 in sums of at most 100 terms.
def test_the_kernels_of_a_tpu_compute_segments_of_several_devices(monkeypatch):
    monkeypatch.setattr(exchanged_experts, "round_length", lambda rows, devices: 8)
    monkeypatch.setattr(tpu_visits, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    with jax.enable_x64(True):
        expected = _expected("uneven")
    with use_mesh(make_mesh({"expert": 4}, jax.devices()[:4])):
        got = _both(_on_mesh("fused"))(*_arguments("uneven", np.float32))
    _assert_equal(got, expected, 5e-6)


def test_a_round_is_a_quarter_of_the_mean_load():
    assert exchanged_experts.round_length(262_144, devices=8) == 8192
    assert exchanged_experts.round_length(262_144, devices=16) == 4096
    assert exchanged_experts.round_length(100, devices=8) == 8


def test_no_array_is_larger_than_the_rows_of_a_device_and_a_round():
    """A fixed buffer for the worst case would hold the rows of all devices."""
    tokens, embed, devices = 1024, 16, 8
    shapes = (devices, tokens, embed), (8, embed, 8), (8, embed, 8), (8, 8, embed), (devices, tokens, K)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    chosen = jax.ShapeDtypeStruct((devices, tokens, K), jnp.int32)

    def loss(inputs, chosen):
        x, gate, up, down, weights = inputs
        return apply_experts_on_mesh(x, ExpertKernels(gate, up, down), weights, chosen, dispatch="blocked").sum()

    with use_mesh(make_mesh({"expert": devices}, jax.devices()[:devices])):
        text = jax.jit(jax.grad(loss)).lower(inputs, chosen).compile().as_text()
    length = exchanged_experts.round_length(tokens * K, devices)
    most = tokens * K + (devices + 1) * length
    rows = [int(match[1]) for match in re.finditer(rf"f32\[(\d+),{embed}\]", text)]
    assert most in rows
    assert max(rows) == most < devices * tokens * K
    assert all(math.prod(map(int, shape.split(","))) <= most * embed for shape in re.findall(r"f32\[([\d,]+)\]", text))
