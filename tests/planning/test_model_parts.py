"""Which part of the model what belongs to, by the names that the train step and Flax give."""

import jax
import pytest

from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.planning.matrix_products import matrix_products
from hybridnorm_jax.planning.memory_traffic import memory_traffic
from hybridnorm_jax.planning.model_parts import BACKWARD, FORWARD, LOSS, OPTIMIZER, PARTS, REST, by_part, part_of
from hybridnorm_jax.training.program import Program


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/jvp(Decoder.hidden)/while/body/closed_call/run_0/run_0.transform/attention/mul", FORWARD),
        (
            "jit(train_step)/while/body/jvp(Decoder)/Decoder.hidden/while/body/jit(dynamic_index_in_dim)/squeeze",
            FORWARD,
        ),
        (
            "jit(train_step)/transpose(jvp(Decoder.hidden))/while/body/checkpoint/rematted_computation/run_1/mul",
            BACKWARD,
        ),
        ("jit(train_step)/transpose(jvp(Decoder.hidden))/while", BACKWARD),
        ("jit(train_step)/jvp(loss)/while/body/closed_call/reduce_max", LOSS),
        ("jit(train_step)/transpose(jvp(loss))/while/body/Decoder.logits/head/dot_general", LOSS),
        ("jit(train_step)/jvp(Decoder)/head/bse,ve->bsv/dot_general", LOSS),
        ("jit(train_step)/optimizer/jit(_where)/select_n", OPTIMIZER),
        ("jit(train_step)/transpose(jvp(Decoder.hidden))/final_norm/mul", REST),
        ("jit(train_step)/jvp(Decoder.hidden)/token_embedding/jit(_take)/gather", REST),
        ("jit(train_step)/lossless/headroom/mul", REST),
        ("broadcast.12", None),
        ("", None),
    ],
)
def test_names_say_the_part(op_name, part):
    assert part_of(op_name) == part


TINY = ["model.d_model=64", "model.num_heads=2", "model.mlp_dim=128", "model.num_layers=3", "model.vocab_size=512"]
CONFIG = [*TINY, "train.seq_len=32", "train.batch_size=8", "model.scheme=pre"]
TOKENS, WIDTH, LAYERS = 32 * 8, 64, 3
# Query, key, value and output are square, and the feed-forward layer has three matrices.
MATRICES = 4 * WIDTH * WIDTH + 3 * WIDTH * 128
ATTENTION = 2 * 2 * TOKENS * 32 * WIDTH  # scores and values of all pairs of 32 positions


@pytest.fixture(scope="module", params=["whole", "chunks"])
def text(request):
    """The compiled train step of a tiny model on one device, its loss whole or in chunks."""
    keys = ["train.loss_chunk=16"] if request.param == "chunks" else []
    config = read_config(["quickstart", *CONFIG, "model.remat=none", "model.attention=xla", *keys])
    program = Program(config, make_mesh(config.mesh.sizes, jax.devices()[:1]))
    return program.lower_train_step().compile().as_text()


def test_the_products_of_each_part_are_those_of_its_matrices(text):
    flops = by_part((each.part, each.flops * each.times) for each in matrix_products(text))
    forward = LAYERS * (2 * TOKENS * MATRICES + ATTENTION)
    scores_again = LAYERS * ATTENTION // 2  # attention keeps none of them for its gradient
    assert flops[FORWARD] == forward
    assert flops[BACKWARD] == 2 * forward + scores_again
    assert (flops[OPTIMIZER], flops[REST]) == (0, 0)
    product = 2 * TOKENS * WIDTH * 512
    assert flops[LOSS] in (3 * product, 4 * product)  # in chunks the logits may be computed a second time


def test_every_part_moves_bytes(text):
    moved = by_part((each.part, each.bytes * each.times) for each in memory_traffic(text))
    assert tuple(moved) == PARTS
    assert min(moved.values()) > 0
    # Adam reads and writes the parameters and two moments, and reads the gradient: 7 float32 for each parameter.
    parameters = LAYERS * MATRICES + 512 * WIDTH
    assert moved[OPTIMIZER] > 7 * 4 * parameters
