"""Claims about training that a few dozen steps of a small model can tell."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.pipeline import Batch, train_iterator
from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.lab.claims.at_start import block_mean
from hybridnorm_jax.lab.claims.claim import Finding
from hybridnorm_jax.lab.compare_options import DEFAULT
from hybridnorm_jax.lab.signal_at_start import Signal
from hybridnorm_jax.lab.signal_claims import CHECKS
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.step import Convert

# Every run here: the configuration `lab` with a warm-up that fits so few steps.
SHORT = ("train.steps=40", "optimizer.warmup_steps=10", "model.scan_unroll=1")
# A model that has what a conversion must fold, small enough to be trained in float64.
PRE_LN = (
    *SHORT,
    "model.scheme=pre",
    "model.norm=layernorm",
    "model.norm_bias=true",
    "model.attention_bias=true",
    "model.mlp_bias=true",
    "model.num_layers=4",
    "model.d_model=64",
    "model.mlp_dim=192",
    "train.batch_size=4",
    "train.seq_len=64",
)
# A model that is deep for its width; its layers are watched at the end.
TRAINED = (*SHORT, "train.steps=60", "model.num_layers=16", "train.batch_size=4", "train.watch_sequences=4")
# In nats. Float64 rounds at 1e-16, float32 at 1e-7, which training enlarges; a conversion that leaves the mean in, or
# trains the converted parameters, is off by more than 1e-2. In bfloat16 one number of 256 is lost at each operation.
LARGEST_GAP = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.03}
ANOTHER = 1e-3
Losses = Float[np.ndarray, "steps"]


def equal_curves(form: str, *, dtype: str, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether a Pre-LN model and its form, whose loss trains the same parameters, have equal losses at every step.

    Args:
      form: of config.run_config.EQUIVALENT_FORMS.
      dtype: of the computation; parameters are float32 at least.
    """
    with jax.enable_x64(dtype == "float64"):
        config = _pre_ln(dtype, arguments)
        section = dataclasses.replace(config.train, equivalent_form=form)
        gap = _gap(pre_ln_losses(dtype, arguments), losses(dataclasses.replace(config, train=section)))
    number = f"largest difference of losses in {config.train.steps} steps, {dtype}: {gap:.1e} nats"
    return Finding(number=number, holds=gap <= LARGEST_GAP[dtype])


def another_trajectory(form: str, *, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether training the converted parameters themselves gives other losses, in float64."""
    with jax.enable_x64(True):
        config = _pre_ln("float64", arguments)
        conversion = conversion_of(config.model, form)
        direct = dataclasses.replace(config, model=conversion.config)
        gap = _gap(pre_ln_losses("float64", arguments), losses(direct, convert=conversion.convert, drawn_by=config))
    number = f"largest difference of losses in {config.train.steps} steps, float64: {gap:.1e} nats"
    return Finding(number=number, holds=gap > ANOTHER)


def _pre_ln(dtype: str, arguments: tuple[str, ...]) -> RunConfig:
    param_dtype = "float64" if dtype == "float64" else "float32"
    return parse([*PRE_LN, f"model.dtype={dtype}", f"model.param_dtype={param_dtype}", *arguments], DEFAULT)


@functools.cache
def pre_ln_losses(dtype: str, arguments: tuple[str, ...]) -> Losses:
    """Of the Pre-LN model itself, which all its forms are compared with."""
    return losses(_pre_ln(dtype, arguments))


def _gap(one: Losses, other: Losses) -> float:
    return float(np.abs(one - other).max())


def batches(config: RunConfig) -> list[Batch]:
    """What the run reads, step by step."""
    data = open_data(config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size, progress=False)
    order = EpochOrder(data.first.train, seed=0, rounds=config.train.shuffle_rounds)
    iterator = train_iterator(order, batch_size=config.train.batch_size, read_threads=1)
    return [next(iterator) for _ in range(config.train.steps)]


def losses(config: RunConfig, *, convert: Convert | None = None, drawn_by: RunConfig | None = None) -> Losses:
    """The loss of every step, in nats.

    Args:
      convert: applied to the parameters before the first step.
      drawn_by: whose parameters these are; None: the configuration's own.
    """
    program = program_of(config)
    state = program.fresh_state()
    if convert is not None:
        drawn = program_of(drawn_by or config).fresh_state().params
        state = dataclasses.replace(state, params=convert(drawn))
    found = []
    for batch in batches(config):
        state, metrics = program.train_step(state, batch)
        found.append(metrics["loss"])
    return np.array(found, np.float64)


@functools.cache
def trained_signal(scheme: str, arguments: tuple[str, ...] = ()) -> Signal:
    """What was measured of each layer of a model that was trained for a few steps, on the batch of its next step."""
    config = parse([*TRAINED, f"model.scheme={scheme}", *arguments], DEFAULT)
    program = program_of(config)
    state = program.fresh_state()
    *read, last = batches(config)
    for batch in read:
        state, _ = program.train_step(state, batch)
    measures = {name: np.asarray(values) for name, values in program.watch(state, last).items()}
    return Signal(scheme, config.model.num_layers, config.model.initializer_name, measures)


def program_of(config: RunConfig) -> Program:
    """On one device, whatever there is."""
    return Program(config, make_mesh(config.mesh.sizes, jax.devices()[:1]))


def checked(check: str, measured: str, *, scheme: str | None = None, arguments: tuple[str, ...] = ()) -> Finding:
    """What signal_claims says of a trained model; see at_start.checked."""
    signal = trained_signal(check if scheme is None else scheme, arguments)
    (claim,) = [each for each in CHECKS[check]("auto", {signal.depth: signal}) if each.measure == measured]
    return Finding(number=claim.seen, holds=claim.holds)


def above_baseline(measured: str, *, scheme: str, baseline: str, sign: int, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether the mean of a measure over the blocks is above (sign 1) or below (-1) the baseline's, after training."""
    one, other = (block_mean(trained_signal(each, arguments), measured) for each in (scheme, baseline))
    number = f"mean of all blocks: {scheme} {one:.3g}, {baseline} {other:.3g}"
    return Finding(number=number, holds=sign * (one - other) > 0)
