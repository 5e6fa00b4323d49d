"""The contestants of equivalence.py: one model, decoder or ViT, in eight forms, forward or in training."""

import argparse
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from vit import LAYOUT, PATCH, ViT, vit_conversion

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import conversion_of, decoder_layout, decompress
from hybridnorm_jax.model import norms
from hybridnorm_jax.model.loss import cross_entropy

FORMS = {
    "pre_ln": "Pre-LN",
    "pre_ln_one_pass": "Pre-LN, one-pass variance",
    "pre_ln_plain": "Pre-LN, no scale and bias",
    "pre_rmsnorm": "Pre-RMSNorm",
    "pre_crmsnorm": "Pre-CRMSNorm, d-1",
    "pre_crmsnorm_padded": "Pre-CRMSNorm, padded",
    "crmsnorm": "CRMSNorm, d, from scratch",
    "no_norm": "no norm",
}
AGREEMENT = 1e-4  # of the largest logit, float32; seen are 1e-6, and a bias left out costs 1e-2


@hn.scheme("benchmark_no_norm", final_norm=False)
def no_norm(layer, num_layers):
    """Y = X + Attn(X); X' = Y + FFN(Y)."""
    return hn.BlockPlacement()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
      outputs: vocabulary or classes.
      seq: tokens; None: as --seq says.
      cut: layers on a CPU, by mode.
      batch: sequences of a training step, on a CPU and elsewhere.
    """

    model: str
    num_layers: int
    d_model: int
    num_heads: int
    outputs: int
    seq: int | None
    cut: dict[str, int]
    batch: tuple[int, int]


SHAPES = {
    "small": Shape("decoder", 12, 768, 12, 50257, None, {"forward": 12, "train": 1}, (16, 32)),
    "medium": Shape("decoder", 24, 1024, 16, 50257, None, {"forward": 8, "train": 1}, (16, 32)),
    "vit": Shape("vit", 12, 768, 12, 1000, 197, {"forward": 12, "train": 1}, (32, 128)),
    # For the tests.
    "tiny": Shape("decoder", 2, 32, 2, 64, None, {"forward": 2, "train": 1}, (2, 2)),
    "tiny_vit": Shape("vit", 2, 32, 2, 10, 17, {"forward": 2, "train": 1}, (2, 2)),
}


def one_pass_layer_norm(x, scale=None, bias=None, *, eps=1e-5):
    """norms.layer_norm with the variance as mean(x^2) - mean(x)^2, which cancels where the mean is large."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, mean_square = wide.mean(-1, keepdims=True), jnp.square(wide).mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + eps)
    return ((wide - mean) * (factor * scale.astype(wide.dtype)) + bias.astype(wide.dtype)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Form:
    """One contestant.

    Attributes:
      model: "decoder" or "vit".
      config: of the model that computes.
      trained: whose parameters it starts from and trains, "pre_ln" or, without scale and bias, "pre_ln_plain".
      convert: those parameters -> the model's own; None: they are.
      one_pass: its LayerNorm is one_pass_layer_norm.
    """

    model: str
    config: hn.ModelConfig
    trained: str
    convert: Callable[[Any], Any] | None = None
    one_pass: bool = False

    @property
    def module(self) -> nn.Module:
        """The Flax module."""
        return {"decoder": hn.Decoder, "vit": ViT}[self.model](self.config)

    def own(self, theta: Any) -> Any:
        """The model's own parameters, of those it trains."""
        return theta if self.convert is None else self.convert(theta)

    def logits(self, params: Any, inputs: jax.Array) -> jax.Array:
        """Logits (batch, positions, outputs); `params` are the model's own."""
        # To be jitted as a whole: the patch lasts while JAX traces, which is when the norm is looked up.
        patch = mock.patch.object(norms, "layer_norm", one_pass_layer_norm)
        with patch if self.one_pass else contextlib.nullcontext():
            return self.module.apply({"params": params}, inputs)


def make_form(model: str, base: hn.ModelConfig, name: str, pad_to: int) -> Form:
    """The contestant of this name; `base` is Pre-LN's config."""
    plain = dataclasses.replace(base, norm_scale=False, norm_bias=False)
    match name:
        case "pre_ln" | "pre_ln_one_pass":
            return Form(model, base, "pre_ln", one_pass=name == "pre_ln_one_pass")
        case "pre_ln_plain":
            return Form(model, plain, "pre_ln_plain")
        case "crmsnorm":
            return Form(model, dataclasses.replace(plain, norm="crmsnorm"), "pre_ln_plain")
        case "no_norm":
            return Form(model, dataclasses.replace(plain, scheme="benchmark_no_norm"), "pre_ln_plain")
        case "pre_crmsnorm_padded":
            return converted(model, base, "pre_ln", "pre_crmsnorm", pad_to)
        case _:
            return converted(model, base, "pre_ln", name)


def converted(model: str, config: hn.ModelConfig, trained: str, form: str, pad_to: int = 1) -> Form:
    """The Pre-LN model of this config in `form`."""
    if model == "vit":
        config, convert = vit_conversion(config, form, pad_to=pad_to)
    else:
        conversion = conversion_of(config, form, pad_to=pad_to)
        config, convert = conversion.config, conversion.convert
    return Form(model, config, trained, convert)


class Contest:
    """All forms of one shape in one mode, with random float32 parameters and data on the device.

    Attributes:
      base: Pre-LN's config.
      forms: by name, those asked for and "pre_ln".
      thetas: the parameters of "pre_ln" and "pre_ln_plain", which all forms start from.
      layers, seq, batch, outputs: as measured.
    """

    def __init__(self, shape: Shape, mode: str, options: argparse.Namespace):
        on_cpu, model = jax.default_backend() == "cpu", shape.model
        self.shape, self.mode, self.dtype = shape, mode, options.dtype
        self.layers = options.layers or (shape.cut[mode] if on_cpu else shape.num_layers)
        self.seq = shape.seq or options.seq
        self.batch = 1 if mode == "forward" else options.batch or shape.batch[0 if on_cpu else 1]
        share = self.layers / shape.num_layers if model == "decoder" else 1
        self.outputs = max(2, round(share * shape.outputs))
        self.base = hn.ModelConfig(
            **{"scheme": "pre", "norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True},
            **{"d_model": shape.d_model, "num_heads": shape.num_heads, "mlp_dim": 4 * shape.d_model},
            **{"activation": "gelu", "positions": "learned", "max_positions": self.seq, "num_layers": self.layers},
            vocab_size=self.outputs,
            head_bias=model == "vit",
            dtype=options.dtype,
            scan_unroll=options.unroll or (1 if on_cpu else self.layers),
        )
        every = {name: make_form(model, self.base, name, options.pad_to) for name in FORMS}
        self.forms = {name: form for name, form in every.items() if name in ("pre_ln", *options.forms)}
        self.inputs, self.targets = self._data()
        self.thetas = {name: self._draw(every[name].module) for name in ("pre_ln", "pre_ln_plain")}

    def _data(self) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(0)
        if self.shape.model == "vit":
            patches = rng.standard_normal((self.batch, self.seq - 1, PATCH), dtype=np.float32)
            return jnp.asarray(patches), jnp.asarray(rng.integers(0, self.outputs, (self.batch, 1), dtype=np.int32))
        stream = rng.integers(0, self.outputs, (self.batch, self.seq + 1), dtype=np.int32)
        return jnp.asarray(stream[:, :-1]), jnp.asarray(stream[:, 1:])

    def _draw(self, module: nn.Module) -> dict:
        """Deviation 0.02, and norm scales around 1 with 0.1, so that no scale or bias can be left out unnoticed."""
        shapes = jax.eval_shape(lambda key: module.init(key, self.inputs), jax.random.key(0))["params"]
        rng = np.random.default_rng(1)

        def leaf(path, like):
            normal = rng.standard_normal(like.shape, dtype=np.float32)
            return jnp.asarray(1 + 0.1 * normal if path[-1].key == "scale" else 0.02 * normal)

        return jax.tree.map_with_path(leaf, shapes)

    def parameters(self) -> dict[str, int]:
        """How many numbers each form's model holds."""
        held = {name: jax.eval_shape(form.own, self.thetas[form.trained]) for name, form in self.forms.items()}
        return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in held.items()}

    def steps(self) -> dict[str, Callable[[], jax.Array]]:
        """For each form a function that starts one forward pass, or one training step, and returns logits or loss."""
        return self._forward_steps() if self.mode == "forward" else self._train_steps()

    def _forward_steps(self):
        """The models' own parameters, converted beforehand, lie in the compute dtype."""

        def stored(params):
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

        shared = {name: stored(theta) for name, theta in self.thetas.items()}
        steps = {}
        for name, form in self.forms.items():
            own = form.convert and stored(jax.jit(form.convert)(self.thetas[form.trained]))
            steps[name] = functools.partial(jax.jit(form.logits), own or shared[form.trained], self.inputs)
        return steps

    def _train_steps(self):
        """Forms that train the same parameters hand them, and the optimizer's state, from one to the next."""
        optimizer = optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.1)
        thetas = jax.tree.map(jnp.copy, self.thetas)  # steps donate them
        states = {name: (theta, optimizer.init(theta)) for name, theta in thetas.items()}

        def run(step, trained):
            states[trained], loss = step(states[trained], self.inputs, self.targets)
            return loss

        steps = {}
        for name, form in self.forms.items():
            step = jax.jit(functools.partial(train_step, form, optimizer), donate_argnums=0)
            steps[name] = functools.partial(run, step, form.trained)
        return steps

    def conversions(self) -> dict[str, Callable[[], Any]]:
        """For each converted form a function that starts the conversion and the pull-back of a gradient, alone."""

        def both(convert, theta, gradient):
            own, pull_back = jax.vjp(convert, theta)
            return own, pull_back(gradient)

        steps = {}
        for name, form in self.forms.items():
            if form.convert:
                theta = self.thetas[form.trained]
                gradient = jax.jit(form.convert)(theta)
                steps[name] = functools.partial(jax.jit(functools.partial(both, form.convert)), theta, gradient)
        return steps


def train_step(form: Form, optimizer: optax.GradientTransformation, state: tuple, inputs, targets) -> tuple:
    """(state after one update, mean loss); the gradient is taken through the conversion."""
    theta, opt_state = state

    def objective(params):
        sums = cross_entropy(form.logits(params, inputs), targets, jnp.ones(targets.shape, jnp.float32))
        return sums.nll / sums.weight

    if form.convert is None:
        loss, grads = jax.value_and_grad(objective)(theta)
    else:  # as training/step.py does, barriers included
        params, pull_back = jax.vjp(form.convert, theta)
        loss, grads = jax.value_and_grad(objective)(jax.lax.optimization_barrier(params))
        (grads,) = pull_back(jax.lax.optimization_barrier(grads))
    updates, opt_state = optimizer.update(grads, opt_state, theta)
    return (optax.apply_updates(theta, updates), opt_state), loss


def agreement(contest: Contest) -> dict[str, float]:
    """Largest difference of each form's logits from those it must equal, over the largest; float32, one sequence.

    Converted forms and the one-pass variance must equal pre_ln; pre_ln_plain its own Pre-RMSNorm; crmsnorm the Pre-LN
    model of d + 1 channels that it stands for. no_norm equals nothing and is not listed.

    Raises:
      RuntimeError: a difference above AGREEMENT: the models are not what this benchmark says.
    """
    model, forms = contest.shape.model, contest.forms
    inputs = contest.inputs[:1] if model == "vit" else contest.inputs[:1, :64]

    def logits(form):
        form = dataclasses.replace(form, config=dataclasses.replace(form.config, dtype="float32", scan_unroll=1))
        with jax.default_matmul_precision("highest"):
            result = jax.jit(lambda theta: form.logits(form.own(theta), inputs))(contest.thetas[form.trained])
        return np.asarray(result)

    plain = dataclasses.replace(contest.base, norm_scale=False, norm_bias=False)
    wider = dataclasses.replace(plain, d_model=plain.d_model + 1)
    layout = LAYOUT if model == "vit" else decoder_layout(plain)
    whole = Form(model, wider, "pre_ln_plain", functools.partial(decompress, layout=layout, width=wider.d_model))
    references = {name: forms["pre_ln"] for name, form in forms.items() if form.trained == "pre_ln"}
    references |= {"pre_ln_plain": converted(model, plain, "pre_ln_plain", "pre_rmsnorm"), "crmsnorm": whole}
    result, base = {}, logits(forms["pre_ln"])
    for name in [name for name in forms if name in references and name != "pre_ln"]:
        reference = references[name]
        right = base if reference is forms["pre_ln"] else logits(reference)
        result[name] = float(np.abs(logits(forms[name]) - right).max() / np.abs(right).max())
        if not result[name] < AGREEMENT:
            raise RuntimeError(f"{name}: its logits are off by {result[name]:.1e} of the largest; it is no such form")
    return result
