"""Which dispatch is chosen, and what one that cannot do what is asked says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_expert_dispatch import EMBED, MLP, by_dispatch, choose, draw, draw_grouped

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.expert_dispatch import KEY, ExpertSize, apply_grouped_experts, resolve_dispatch
from hybridnorm_jax.kernels.swiglu import ExpertKernels


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "expected"),
    [
        ("auto", "cpu", jnp.float32, "blocked"),
        ("auto", "gpu", jnp.bfloat16, "grouped"),
        ("auto", "gpu", jnp.float64, "blocked"),
        ("auto", "tpu", jnp.bfloat16, "fused"),
        ("auto", "tpu", jnp.float64, "blocked"),
        ("ragged", "cpu", jnp.float64, "ragged"),
        ("dense", None, jnp.float64, "dense"),
        ("gmm", None, jnp.bfloat16, "gmm"),
    ],
)
def test_resolving(name, platform, dtype, expected):
    assert resolve_dispatch(name, platform=platform, dtype=dtype) == expected


@pytest.mark.parametrize(
    ("embed", "mlp", "expected"),
    [(2048, 1024, "fused"), (4096, 14336, "fused"), (193, 50, "fused"), (65536, 128, "gmm")],
)
def test_on_a_tpu_the_size_of_an_expert_decides(embed, mlp, expected):
    size = ExpertSize(embed, mlp)
    assert resolve_dispatch("auto", platform="tpu", dtype=jnp.bfloat16, size=size) == expected
    if expected == "gmm":
        with pytest.raises(ConfigError, match="no room in a core for experts of 65536 x 128 channels; use gmm"):
            resolve_dispatch("fused", platform="tpu", dtype=jnp.bfloat16, size=size)


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "part"),
    [
        ("gmm", "cpu", jnp.float32, "needs platform tpu, this is cpu"),
        ("gmm", "tpu", jnp.float16, "not float16"),
        ("ragged", "gpu", jnp.bfloat16, "as many times the work as there are experts; use auto or blocked"),
        ("grouped", "tpu", jnp.bfloat16, "needs platform gpu, this is tpu"),
        ("fused", "gpu", jnp.bfloat16, "needs platform tpu, this is gpu"),
        ("block", "cpu", jnp.float32, "did you mean 'blocked'"),
        ("all_to_all", "cpu", jnp.float32, "not known"),
    ],
)
def test_refusals_are_one_line_with_the_key(name, platform, dtype, part):
    with pytest.raises(ConfigError) as error:
        resolve_dispatch(name, platform=platform, dtype=dtype)
    message = str(error.value)
    assert part in message
    assert message.startswith(f"{KEY}={name}: ")
    assert "\n" not in message


def test_experts_refuse_what_the_named_dispatch_cannot_do():
    with jax.enable_x64(True), pytest.raises(ConfigError, match="not float64"):
        by_dispatch("gmm", choose(4, 3, 1))(*draw(4, 3, 1))


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (5, EMBED, 1), "x: shape"),
        (0, (5, EMBED + 1), "gate: shape"),
        (1, (3, EMBED), "gate: shape"),
        (2, (4, EMBED, MLP), "up: shape"),
        (3, (3, EMBED, MLP), "down: shape"),
        (4, (5, 1), "weights: shape"),
        (5, (5,), "chosen: shape"),
        (5, (4, 2), "chosen: shape"),
    ],
)
def test_wrong_shapes_name_the_argument(position, shape, message):
    arguments = [*draw(5, 3, 2, np.float32), choose(5, 3, 2)]
    arguments[position] = jnp.zeros(shape, arguments[position].dtype)
    *inputs, chosen = arguments
    with pytest.raises(ValueError, match=message):
        by_dispatch("dense", chosen)(*inputs)


@pytest.mark.parametrize("k", [0, 4])
def test_more_choices_than_experts_or_none(k):
    *arrays, _ = draw(5, 3, 1, np.float32)
    with pytest.raises(ValueError, match=f"chosen: k={k} must be between 1 and the number of experts, 3"):
        by_dispatch("blocked", jnp.zeros((5, k), int))(*arrays, jnp.ones((5, k)))


def test_kernels_of_another_dtype_are_refused():
    x, gate, up, down, weights = draw(5, 3, 2, np.float32)
    with pytest.raises(ValueError, match="up: dtype bfloat16 must be that of x, float32"):
        by_dispatch("dense", choose(5, 3, 2))(x, gate, up.astype(jnp.bfloat16), down, weights)


@pytest.mark.parametrize(("argument", "shape"), [("rows", (4,)), ("row_weights", (3,)), ("sizes", (2,))])
def test_wrong_shapes_of_grouped_rows_name_the_argument(argument, shape):
    (rows, gate, up, down, row_weights), sizes = draw_grouped((1, 1, 2), 4, np.float32)
    arguments = {"rows": rows, "row_weights": row_weights, "sizes": sizes}
    arguments[argument] = jnp.zeros(shape, arguments[argument].dtype)
    with pytest.raises(ValueError, match=f"{argument}: shape"):
        apply_grouped_experts(**arguments, kernels=ExpertKernels(gate, up, down), dispatch="blocked")
