"""Whether a device computes what the references say: models against other people's tensors, kernels against float64.

Each check is a number that says how far the device is off, and the bound that it must not pass. An error is the norm of
the difference over the norm of the reference, for gradients the largest of all parameters.

Bounds: in float32, with products of full precision, sums of at most some thousand terms in another order are off by
some 1e-7 each, and a GPU's and TPU's exponentials by as much; 1e-5 leaves room for the layers of a model to carry
them on. In bfloat16 a rounding is off by 2^-9 at most and 0.1 % typically. The inputs of a kernel's products and its
results take a few of them; a model of three layers takes some thirty, independent of each other, forward and as many
backward.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import load_huggingface
from hybridnorm_jax.kernels.attention_backends import capability_of, resolve_backend, softmax_attention
from hybridnorm_jax.kernels.dense_products import head_product
from hybridnorm_jax.kernels.expert_dispatch import apply_experts, resolve_dispatch
from hybridnorm_jax.kernels.loss_kernels import check_loss_kernel
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.kernels.token_logits import TokenLogits, token_logits

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
SCHEME, SIZES = "hybrid_star", {"d_model": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "vocab_size": 61}
# Of a model's logits and loss, of its gradients, and the same of kernels alone.
LOGITS = {"float32": 1e-5, "bfloat16": 0.03}
GRADIENTS = {"float32": 1e-5, "bfloat16": 0.06}
RESULT = {"float32": 1e-5, "bfloat16": 0.008}
KERNEL_GRADIENTS = {"float32": 1e-5, "bfloat16": 0.012}


class Check(NamedTuple):
    """What was compared, the error, and the bound on it; an error that is no number fails."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


class AttentionShape(NamedTuple):
    """Of a check of attention alone."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int


class ExpertShape(NamedTuple):
    """Of a check of experts alone."""

    tokens: int
    embed: int
    mlp: int
    experts: int
    k: int


class HeadShape(NamedTuple):
    """Of a check of the head and the loss."""

    tokens: int
    embed: int
    vocab: int


SMALL_ATTENTION = (AttentionShape(batch=1, seq=48, heads=4, kv_heads=2, head_dim=16),)
ATTENTION = (
    AttentionShape(batch=2, seq=1024, heads=8, kv_heads=2, head_dim=64),
    AttentionShape(batch=1, seq=1000, heads=4, kv_heads=4, head_dim=128),
)
SMALL_EXPERTS = ExpertShape(tokens=64, embed=16, mlp=24, experts=4, k=2)
SMALL_HEAD, HEAD = HeadShape(tokens=24, embed=16, vocab=61), HeadShape(tokens=1000, embed=512, vocab=5003)
EXPERTS = ExpertShape(tokens=4096, embed=512, mlp=256, experts=16, k=4)


def attention_checks(backend: str, dtype: str, *, small: bool) -> Iterator[Check]:
    """A model by this backend against its authors' tensors; and attention alone at the sizes of real models."""
    yield from _model_checks(backend, dtype)
    for shape in SMALL_ATTENTION if small else ATTENTION:
        for segmented in (False, True):
            if _attention_obstacle(backend, dtype, shape.head_dim, segmented) is None:
                yield from _kernel_checks(backend, dtype, shape, segmented)


def expert_checks(dispatch: str, dtype: str, *, small: bool) -> Iterator[Check]:
    """A mixture of experts against transformers' logits; and experts alone, also with one that all tokens choose."""
    yield from _moe_model_checks(dispatch, dtype)
    shape = SMALL_EXPERTS if small else EXPERTS
    for skewed in (False, True):
        yield from _layer_checks(dispatch, dtype, shape, skewed)


def loss_checks(kernel: str, dtype: str, *, small: bool) -> Iterator[Check]:
    """What the loss reads of logits, and its gradients, against float64."""
    yield from _loss_checks(kernel, dtype, SMALL_HEAD if small else HEAD)


def attention_obstacle(backend: str, dtype: str) -> str | None:
    """Why this device cannot compute attention of the goldens' model so; None: it can."""
    return _attention_obstacle(backend, dtype, SIZES["d_model"] // SIZES["num_heads"], False)


def dispatch_obstacle(dispatch: str, dtype: str) -> str | None:
    """Why this device cannot compute experts so; None: it can."""
    return _refusal(resolve_dispatch, dispatch, platform=jax.default_backend(), dtype=dtype)


def loss_obstacle(kernel: str, dtype: str) -> str | None:
    """Why this device cannot compute the loss so; None: it can."""
    asked = {"width": HEAD.embed, "capped": False, "more_than_table": None, "split_by": ()}
    return _refusal(check_loss_kernel, kernel, platform=jax.default_backend(), dtype=dtype, **asked)


def _attention_obstacle(backend: str, dtype: str, head_dim: int, segment_ids: bool) -> str | None:
    return _refusal(
        resolve_backend,
        backend,
        platform=jax.default_backend(),
        dtype=dtype,
        head_dim=head_dim,
        segment_ids=segment_ids,
        capability=capability_of(jax.devices()[0]),
    )


def _refusal(resolve: Callable[..., Any], name: str, **asked: Any) -> str | None:
    try:
        resolve(name, **asked)
    except hn.UserError as error:
        return str(error)
    return None


def _precise(function: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    """Jitted; with float32 products of full precision, for which GPUs take TF32 and TPUs bfloat16 otherwise."""

    def computed(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return jax.jit(function)(*arguments)

    return computed


def _error(array: Any, reference: Any) -> float:
    array, reference = np.asarray(array, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(array - reference) / max(np.linalg.norm(reference), 1e-30))


# ---- Models


def _model_checks(backend: str, dtype: str) -> Iterator[Check]:
    config = hn.ModelConfig(scheme=SCHEME, dtype=dtype, attention=backend, **SIZES)
    with np.load(GOLDENS / f"hybridnorm_official_{SCHEME}.npz") as file:
        golden = dict(file)
    params = hn.params_from_olmo(config, {name: each for name, each in golden.items() if name.startswith("param/")})
    gradients = {name.removeprefix("grad/"): each for name, each in golden.items() if name.startswith("grad/")}
    tokens = jnp.asarray(golden["tokens"])

    def loss_and_logits(params: Any) -> tuple[Any, Any]:
        logits = hn.Decoder(config).apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    run = _precise(jax.value_and_grad(loss_and_logits, has_aux=True), dtype)
    (loss, logits), found = run(params)
    expected = hn.params_from_olmo(config, gradients)
    errors = [_error(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
    yield Check(f"{SCHEME}, logits", _error(logits, golden["logits"]), LOGITS[dtype])
    yield Check(f"{SCHEME}, loss", _error(loss, golden["loss"]), LOGITS[dtype])
    yield Check(f"{SCHEME}, gradients", max(errors), GRADIENTS[dtype])


def _moe_model_checks(dispatch: str, dtype: str) -> Iterator[Check]:
    # Only in float32: with rounded activations a token may choose another expert, and its logits are then others.
    if dtype != "float32":
        return
    config, params = load_huggingface(GOLDENS / "hf_olmoe", dtype=dtype)
    config = dataclasses.replace(config, expert_dispatch=dispatch)
    with np.load(GOLDENS / "hf_olmoe" / "golden.npz") as golden:
        tokens, expected = jnp.asarray(golden["tokens"]), golden["logits"]
    logits = _precise(lambda params: hn.Decoder(config).apply({"params": params}, tokens), dtype)(params)
    yield Check("OLMoE, logits", _error(logits, expected), LOGITS[dtype])


# ---- Kernels


def _kernel_checks(backend: str, dtype: str, shape: AttentionShape, segmented: bool) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    head_counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    drawn = [rng.standard_normal((shape.batch, shape.seq, heads, shape.head_dim)) for heads in head_counts]
    query, key, value, d_context = (jnp.asarray(array, dtype) for array in drawn)
    ids = np.sort(rng.integers(0, 3, (shape.batch, shape.seq)), axis=1).astype(np.int32) if segmented else None

    def both(query: Any, key: Any, value: Any) -> Any:
        def attention(*inputs: Any) -> Any:
            return softmax_attention(*inputs, segment_ids=None if ids is None else jnp.asarray(ids), backend=backend)

        context, pull = jax.vjp(attention, query, key, value)
        return context, *pull(d_context)

    got = _precise(both, dtype)(query, key, value)
    expected = _attention_in_float64(*(np.asarray(array, np.float64) for array in (query, key, value, d_context)), ids)
    errors = [_error(array, reference) for array, reference in zip(got, expected, strict=True)]
    name = f"attention {'x'.join(map(str, shape))}{', documents' if segmented else ''}"
    yield Check(f"{name}, context", errors[0], RESULT[dtype])
    yield Check(f"{name}, gradients", max(errors[1:]), KERNEL_GRADIENTS[dtype])


def _attention_in_float64(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, d_context: np.ndarray, ids: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """Context, and the gradients of query, key and value: softmax attention in NumPy, with the whole matrix."""
    batch, seq, heads, head_dim = query.shape
    readers, scale = heads // key.shape[2], head_dim**-0.5
    k, v = np.repeat(key, readers, axis=2), np.repeat(value, readers, axis=2)
    visible = np.tri(seq, dtype=bool)[None, None]
    if ids is not None:
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    q, k, v, d = (array.swapaxes(1, 2) for array in (query, k, v, d_context))
    scores = np.where(visible, scale * q @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = d @ v.swapaxes(2, 3)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))

    def summed(gradient: np.ndarray) -> np.ndarray:
        return gradient.swapaxes(1, 2).reshape(batch, seq, -1, readers, head_dim).sum(3)

    return (
        (weights @ v).swapaxes(1, 2),
        (d_scores @ k).swapaxes(1, 2),
        summed(d_scores.swapaxes(2, 3) @ q),
        summed(weights.swapaxes(2, 3) @ d),
    )


def _layer_checks(dispatch: str, dtype: str, shape: ExpertShape, skewed: bool) -> Iterator[Check]:
    """Against `dense` on the same device, in float32 with products of full precision."""
    rng = np.random.default_rng(0)
    inner, outer = (shape.experts, shape.embed, shape.mlp), (shape.experts, shape.mlp, shape.embed)
    x = jnp.asarray(rng.standard_normal((shape.tokens, shape.embed)), dtype)
    kernels = [jnp.asarray(rng.standard_normal(size) * size[1] ** -0.5, dtype) for size in (inner, inner, outer)]
    weights = jnp.asarray(rng.random((shape.tokens, shape.k)), jnp.float32)
    scores = rng.random((shape.tokens, shape.experts))
    scores[:, 0] += skewed  # chosen by all
    chosen = jnp.asarray(np.argsort(-scores, axis=1)[:, : shape.k], jnp.int32)
    d_out = jnp.asarray(rng.standard_normal(x.shape), dtype)

    def both(name: str, *inputs: Any) -> Any:
        def experts(x: Any, gate: Any, up: Any, down: Any) -> Any:
            return apply_experts(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=name)

        y, pull = jax.vjp(experts, *inputs)
        return y, *pull(d_out.astype(y.dtype))

    got = _precise(lambda *inputs: both(dispatch, *inputs), dtype)(x, *kernels)
    wide = [array.astype(jnp.float32) for array in (x, *kernels)]
    expected = _precise(lambda *inputs: both("dense", *inputs), "float32")(*wide)
    errors = [_error(array, reference) for array, reference in zip(got, expected, strict=True)]
    name = f"experts {'x'.join(map(str, shape))}{', one in every token' if skewed else ''}"
    yield Check(f"{name}, result", errors[0], RESULT[dtype])
    yield Check(f"{name}, gradients", max(errors[1:]), KERNEL_GRADIENTS[dtype])


def _loss_checks(kernel: str, dtype: str, shape: HeadShape) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, shape.tokens, shape.embed)) * shape.embed**-0.5, dtype)
    table = jnp.asarray(rng.standard_normal((shape.vocab, shape.embed)), dtype)
    targets = rng.integers(0, shape.vocab, (1, shape.tokens)).astype(np.int32)
    gradient = TokenLogits(*np.float32(rng.standard_normal((2, 1, shape.tokens))))

    def read(hidden: Any, table: Any) -> TokenLogits:
        if kernel == "xla":
            return token_logits(head_product(hidden, table, (((2,), (1,)), ((), ()))), targets)
        from hybridnorm_jax.kernels.tpu_head import Form, head_table, head_token_logits

        head = head_table(table, targets, dtype=hidden.dtype)
        return head_token_logits(hidden, head, targets, form=Form(vocab_first=True))

    def both(hidden: Any, table: Any) -> Any:
        found, pull = jax.vjp(read, hidden, table)
        return *found, *pull(gradient)

    got = _precise(both, dtype)(hidden, table.astype(jnp.float32))
    wide, rows = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    logits = wide @ rows.T
    log_z = np.log(np.exp(logits).sum(-1))  # of logits near 0
    one_hot = np.eye(shape.vocab)[targets]
    d_logits = gradient.log_z[..., None] * np.exp(logits - log_z[..., None]) + gradient.chosen[..., None] * one_hot
    expected = (log_z, (logits * one_hot).sum(-1), d_logits @ rows, d_logits[0].T @ wide[0])
    errors = [_error(array, reference) for array, reference in zip(got, expected, strict=True)]
    name = f"loss {'x'.join(map(str, shape))}"
    yield Check(f"{name}, log Z and the target's logit", max(errors[:2]), RESULT[dtype])
    yield Check(f"{name}, gradients", max(errors[2:]), KERNEL_GRADIENTS[dtype])
