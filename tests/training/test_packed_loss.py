"""The loss of packed rows is that of their documents alone: in one sum, its gradient, in microbatches and on meshes."""

import functools
import math

import jax
import numpy as np
import pytest
from covering import others_are_long

from hybridnorm_jax.config.run_config import DataSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.data import train_iterator, validation_batches
from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.data.rows.packed_rows import PackedRows, Packing
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.step import batch_loss

SEQ, END = 16, 60
# Tokens with the separator. Few different lengths, because each is compiled; together they leave padding.
LENGTHS = (3, 7, 3, 7, 7, 3, 17, 3, 7, 7)
EXACT = {"dtype": "float64", "param_dtype": "float64"}
# Some 70 terms of a sum, each rounded to 2^-53 of a number of about 4 after a few hundred additions.
TOLERANCE = 1e-12


def _documents():
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(0, END, length - 1), END).astype(np.int32) for length in LENGTHS]


def _rows(**keys):
    tokens = np.concatenate(_documents())
    stream = TokenStream((Extent(tokens, "tokens", 0, len(tokens)),), END + 1)
    options = {"seq_len": SEQ, "one_in_a_row": False, "separator_id": END, "segment_ids": True, "cache_dir": "/nowhere"}
    return PackedRows(stream, Packing(**(options | keys)))


def _alone(document):
    """A batch of one document, as long as it is, with nothing that says so."""
    row = {"tokens": document[:-1], "targets": document[1:], "weights": np.ones(len(document) - 1, np.float32)}
    return {name: values[None] for name, values in row.items()}


@functools.cache
def _sum(config, chunk=None):
    """(parameters, batch) -> (summed loss, its gradient)."""
    model = Decoder(config)

    def loss(params, batch):
        return batch_loss(model, {"params": params}, batch, chunk=chunk).total

    return jax.jit(jax.value_and_grad(loss))


PLACEMENTS = {
    "pre": {},
    "hybrid_star": {"positions": "learned", "max_positions": SEQ},
    "span": {"positions": "alibi"},
    "post": {"positions": "learned", "max_positions": SEQ, "norm": "layernorm"},
    "peri": {"windows": (0, 5)},
}


@pytest.mark.parametrize("scheme", others_are_long(list(PLACEMENTS), ("pre", "hybrid_star")))
def test_packed_rows_have_the_loss_and_the_gradient_of_each_document_alone(small_config, random_params, scheme):
    with jax.enable_x64(True):
        config = small_config(**EXACT, scheme=scheme, **PLACEMENTS[scheme], num_layers=2)
        params = random_params(config)
        loss = _sum(config)
        alone = [loss(params, _alone(document)) for document in _documents()]
        expected = sum(value for value, _ in alone)
        gradient = jax.tree.map(lambda *parts: sum(parts), *(each for _, each in alone))
        for rows in (_rows(), _rows(one_in_a_row=True), _rows(one_in_a_row=True, segment_ids=False)):
            assert rows.padding > 0
            (batch,) = validation_batches(rows, batch_size=len(LENGTHS))
            found, of_packed = loss(params, batch)
            np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
            for one, other in zip(jax.tree.leaves(of_packed), jax.tree.leaves(gradient), strict=True):
                assert np.linalg.norm(one - other) < TOLERANCE * np.linalg.norm(other)


def test_a_document_that_is_cut_has_the_loss_of_its_pieces(small_config, random_params):
    """Here in chunks of the loss, too."""
    with jax.enable_x64(True):
        config = small_config(**EXACT, scheme="pre", num_layers=2)
        params, rows = random_params(config), _rows(seq_len=6)
        (batch,) = validation_batches(rows, batch_size=len(rows))
        pieces = [document[begin : begin + 7] for document in _documents() for begin in range(0, len(document) - 1, 6)]
        loss = _sum(config)
        expected = sum(loss(params, _alone(piece))[0] for piece in pieces)
        np.testing.assert_allclose(_sum(config, chunk=3)(params, batch)[0], expected, rtol=TOLERANCE)


def _first_losses(model, mesh, **keys):
    """The losses of three steps."""
    config = RunConfig(
        model=model,
        data=DataSection(packing="documents"),
        train=TrainSection(batch_size=4, seq_len=SEQ, steps=4, **keys),
        optimizer=OptimizerSection(learning_rate=1e-2, schedule="constant"),
    )
    program = Program(config, make_mesh(mesh, jax.devices()[: math.prod(mesh.values())]))
    accumulation = config.train.grad_accumulation
    order = EpochOrder(_rows(), 3, rounds=16)
    iterator = train_iterator(order, batch_size=4, accumulation=accumulation, read_threads=1)
    state, losses = program.fresh_state(), []
    for _ in range(3):
        state, metrics = program.train_step(state, next(iterator))
        losses.append(float(metrics["loss"]))
    return losses


def test_training_on_packed_rows_is_the_same_in_microbatches_and_on_meshes(small_config):
    """Rows have different numbers of targets, so a mean of microbatches' means would be another loss."""
    with jax.enable_x64(True):
        model = small_config(**EXACT, scheme="pre", num_layers=2)
        batch = next(train_iterator(EpochOrder(_rows(), 3, rounds=16), batch_size=4, read_threads=1))
        assert len(set(batch["weights"].sum(-1).ravel().tolist())) > 1
        expected = _first_losses(model, {"data": 1})
        # Sums of some thousand numbers in another order, carried through three updates.
        for found in (
            _first_losses(model, {"data": 1}, grad_accumulation=4),
            _first_losses(model, {"data": 2, "context": 2}),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-10)
