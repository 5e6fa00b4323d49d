"""All forms of one model, forward or in training: what equivalence.py times, and the proof that they agree."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from norm_forms import FORMS, Form, Shape, converted, make_form
from vit import LAYOUT, PATCH

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import decoder_layout, decompress
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.kernels.token_logits import token_logits
from hybridnorm_jax.model.loss import cross_entropy

# Share of the largest logit, in float32. Forms that are right differ by 1e-6; a bias left out makes 1e-2.
AGREEMENT = 1e-4


@dataclasses.dataclass(frozen=True)
class ContestOptions:
    """What the command line says of all contests; see its --help.

    Attributes:
      layers, batch, unroll: None: what suits the shape, the mode and the platform.
    """

    forms: tuple[str, ...]
    seq: int
    layers: int | None
    batch: int | None
    dtype: str
    pad_to: int
    unroll: int | None


class TrainState(NamedTuple):
    """What a training step updates."""

    theta: Any
    optimizer: optax.OptState


class Contest:
    """All forms of one shape in one mode, with random float32 parameters and data on the device.

    Attributes:
      base: Pre-LN's config.
      forms: by name, those asked for and "pre_ln".
      thetas: the parameters of "pre_ln" and "pre_ln_plain", which all forms start from.
      layers, seq, batch, outputs: as measured.
    """

    def __init__(self, shape: Shape, mode: str, options: ContestOptions):
        on_cpu = jax.default_backend() == "cpu"
        self.shape, self.mode, self.dtype = shape, mode, options.dtype
        self.layers = options.layers or shape.layers(mode, on_cpu=on_cpu)
        self.seq = shape.seq or options.seq
        if mode == "forward":
            self.batch = 1
        else:
            self.batch = options.batch or (shape.cpu_batch if on_cpu else shape.batch)
        # With fewer layers a smaller vocabulary, so that blocks and head keep their shares of the work.
        share = self.layers / shape.num_layers if shape.model == "decoder" else 1
        self.outputs = max(2, round(share * shape.outputs))
        self.base = self._pre_ln_config(unroll=options.unroll or (1 if on_cpu else self.layers))
        every = {name: make_form(shape.model, self.base, name, options.pad_to) for name in FORMS}
        self.forms = {name: form for name, form in every.items() if name == "pre_ln" or name in options.forms}
        self.inputs, self.targets = self._data()
        self.thetas = {name: self._draw(every[name].module) for name in ("pre_ln", "pre_ln_plain")}

    def _pre_ln_config(self, *, unroll: int) -> hn.ModelConfig:
        return hn.ModelConfig(
            scheme="pre",
            norm="layernorm",
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            head_bias=self.shape.model == "vit",
            d_model=self.shape.d_model,
            num_heads=self.shape.num_heads,
            mlp_dim=4 * self.shape.d_model,
            num_layers=self.layers,
            vocab_size=self.outputs,
            activation="gelu",
            positions="learned",
            max_positions=self.seq,
            dtype=self.dtype,
            scan_unroll=unroll,
        )

    def _data(self) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(0)
        if self.shape.model == "vit":
            patches = rng.standard_normal((self.batch, self.seq - 1, PATCH), dtype=np.float32)
            return jnp.asarray(patches), jnp.asarray(rng.integers(0, self.outputs, (self.batch, 1), dtype=np.int32))
        stream = rng.integers(0, self.outputs, (self.batch, self.seq + 1), dtype=np.int32)
        return jnp.asarray(stream[:, :-1]), jnp.asarray(stream[:, 1:])

    def _draw(self, module: nn.Module) -> dict[str, Any]:
        """Parameters with deviation 0.02, and scales of norms around 1 with deviation 0.1.

        No scale and no bias is 1 or 0: a conversion that leaves one out is noticed.
        """
        shapes = jax.eval_shape(lambda key: module.init(key, self.inputs), jax.random.key(0))["params"]
        rng = np.random.default_rng(1)

        def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
            normal = rng.standard_normal(like.shape, dtype=np.float32)
            return jnp.asarray(1 + 0.1 * normal if path[-1].key == "scale" else 0.02 * normal)

        return jax.tree.map_with_path(leaf, shapes)

    def parameters(self) -> dict[str, int]:
        """How many numbers each form's model holds."""
        counts = {}
        for name, form in self.forms.items():
            own = jax.eval_shape(form.own, self.thetas[form.trained])
            counts[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(own))
        return counts

    def steps(self) -> dict[str, Callable[[], jax.Array]]:
        """For each form a function that starts one forward pass, or one training step, and returns logits or loss."""
        return self._forward_steps() if self.mode == "forward" else self._train_steps()

    def _forward_steps(self) -> dict[str, Callable[[], jax.Array]]:
        """The models' own parameters, converted beforehand, lie in the compute dtype."""

        def stored(params: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

        shared = {name: stored(theta) for name, theta in self.thetas.items()}
        steps = {}
        for name, form in self.forms.items():
            if form.convert is None:
                own = shared[form.trained]
            else:
                own = stored(jax.jit(form.convert)(self.thetas[form.trained]))
            steps[name] = functools.partial(jax.jit(form.logits), own, self.inputs)
        return steps

    def _train_steps(self) -> dict[str, Callable[[], jax.Array]]:
        """Forms that train the same parameters hand them, and the optimizer's state, from one to the next."""
        optimizer = optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.1)
        thetas = jax.tree.map(jnp.copy, self.thetas)  # steps donate them
        states = {name: TrainState(theta, optimizer.init(theta)) for name, theta in thetas.items()}

        def run(step: Callable[..., tuple[TrainState, jax.Array]], trained: str) -> jax.Array:
            states[trained], loss = step(states[trained], self.inputs, self.targets)
            return loss

        steps = {}
        for name, form in self.forms.items():
            step = jax.jit(functools.partial(train_step, form, optimizer), donate_argnums=0)
            steps[name] = functools.partial(run, step, form.trained)
        return steps

    def conversions(self) -> dict[str, Callable[[], Any]]:
        """For each converted form a function that starts the conversion and the pull-back of a gradient, alone."""

        def there_and_back(convert: Callable[[Any], Any], theta: Any, gradient: Any) -> tuple[Any, Any]:
            own, pull_back = jax.vjp(convert, theta)
            return own, pull_back(gradient)

        steps = {}
        for name, form in self.forms.items():
            if form.convert is not None:
                theta = self.thetas[form.trained]
                gradient = jax.jit(form.convert)(theta)
                conversion = jax.jit(functools.partial(there_and_back, form.convert))
                steps[name] = functools.partial(conversion, theta, gradient)
        return steps


def train_step(
    form: Form, optimizer: optax.GradientTransformation, state: TrainState, inputs: jax.Array, targets: jax.Array
) -> tuple[TrainState, jax.Array]:
    """(state after one update, mean loss); the gradient is taken through the conversion."""

    def objective(params: Any) -> jax.Array:
        found = token_logits(widened(form.logits(params, inputs)), targets)
        sums = cross_entropy(found, jnp.ones(targets.shape, jnp.float32))
        return sums.nll / sums.weight

    if form.convert is None:
        loss, grads = jax.value_and_grad(objective)(state.theta)
    else:  # as training/step.py does, barriers included
        params, pull_back = jax.vjp(form.convert, state.theta)
        loss, grads = jax.value_and_grad(objective)(jax.lax.optimization_barrier(params))
        (grads,) = pull_back(jax.lax.optimization_barrier(grads))
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.theta)
    return TrainState(optax.apply_updates(state.theta, updates), optimizer_state), loss


def agreement(contest: Contest) -> dict[str, float]:
    """Largest difference of each form's logits from those it must equal, over the largest; float32, one sequence.

    no_norm equals nothing and is not listed.

    Raises:
      RuntimeError: a difference above AGREEMENT: the models are not what this benchmark says.
    """
    references = _references(contest)
    logits_of_pre_ln = _exact_logits(contest, contest.forms["pre_ln"])
    result = {}
    for name, form in contest.forms.items():
        if name == "pre_ln" or name not in references:
            continue
        reference = references[name]
        is_pre_ln = reference is contest.forms["pre_ln"]
        right = logits_of_pre_ln if is_pre_ln else _exact_logits(contest, reference)
        result[name] = float(np.abs(_exact_logits(contest, form) - right).max() / np.abs(right).max())
        if not result[name] < AGREEMENT:
            raise RuntimeError(f"{name}: its logits are off by {result[name]:.1e} of the largest; it is no such form")
    return result


def _references(contest: Contest) -> dict[str, Form]:
    """Name of a form -> a form with the same logits.

    For converted forms and the one-pass variance it is pre_ln; for pre_ln_plain its own Pre-RMSNorm; for crmsnorm the
    Pre-LN model of d + 1 channels that it stands for.
    """
    model = contest.shape.model
    plain = dataclasses.replace(contest.base, norm_scale=False, norm_bias=False)
    wider = dataclasses.replace(plain, d_model=plain.d_model + 1)
    layout = LAYOUT if model == "vit" else decoder_layout(plain)
    widen = functools.partial(decompress, layout=layout, width=wider.d_model)
    references = {name: contest.forms["pre_ln"] for name, form in contest.forms.items() if form.trained == "pre_ln"}
    references["pre_ln_plain"] = converted(model, plain, trained="pre_ln_plain", form="pre_rmsnorm")
    references["crmsnorm"] = Form(model, wider, "pre_ln_plain", widen)
    return references


def _exact_logits(contest: Contest, form: Form) -> np.ndarray:
    """Logits of one sequence in float32, with products at the highest precision."""
    inputs = contest.inputs[:1] if contest.shape.model == "vit" else contest.inputs[:1, :64]
    exact = dataclasses.replace(form, config=dataclasses.replace(form.config, dtype="float32", scan_unroll=1))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda theta: exact.logits(exact.own(theta), inputs))(contest.thetas[form.trained])
    return np.asarray(logits)
