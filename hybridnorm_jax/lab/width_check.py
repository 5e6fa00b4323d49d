"""The coordinate check of muP: how the stream after every block changes with the width, with its rules and without.

Yang et al. 2022, "Tensor Programs V" (2203.03466), appendix D.1: train models of several widths for a few steps at one
learning rate, and look at the size of their activations. With the rules of model/width_scaling.py it does not depend on
the width; without them it grows.
"""

import dataclasses
import itertools
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key
from hybridnorm_jax.lab.compare_options import DEFAULT, refuse
from hybridnorm_jax.lab.signal_at_start import random_batch
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.model.watched_streams import STREAM
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.whole_files import expanded

# Key of a run that is set here -> what sets it.
SET_HERE = {
    "model.scheme": "schemes=[...]",
    "model.d_model": "widths=[...]",
    "model.base_width": "the smallest of widths=[...]",
    "train.steps": "updates=N",
    "train.batch_size": "sequences=N",
    "train.seq_len": "seq_len=N",
}
# What is not said is as it shows the rules best: a rate that moves the smallest model far in a few steps.
USUAL = (
    *("optimizer.learning_rate=0.01", "optimizer.schedule=constant", "optimizer.warmup_steps=0"),
    *("model.num_layers=3", "model.scan_unroll=1"),
)
# Between the largest and the smallest of all widths, with the rules.
LARGEST_SPREAD = 1.5


@dataclasses.dataclass(frozen=True)
class WidthOptions:
    """What is trained and measured."""

    schemes: tuple[str, ...] = key(("pre", "hybrid_star", "span"), "norm placements")
    widths: tuple[int, ...] = key(
        (32, 64, 128, 256), "values of model.d_model; the smallest is the base width", at_least=1, at_most=65_536
    )
    updates: int = key(5, "training steps, all with the same batch", at_least=1, at_most=1000)
    sequences: int = key(4, "how many sequences of random tokens", at_least=1, at_most=65_536)
    seq_len: int = key(16, "tokens of each sequence", at_least=1, at_most=1_048_576)
    out: str = key("runs/lab-widths", "directory for widths.json")

    def __post_init__(self) -> None:
        check_fields("", self)
        check(bool(self.out), "out", self.out, "must name a directory")
        check(bool(self.schemes), "schemes", "[]", "at least one is needed")
        check(len(set(self.schemes)) == len(self.schemes), "schemes", self.schemes, "one of them is named twice")
        right = "at least two are needed, none of them twice"
        check(len(set(self.widths)) == len(self.widths) > 1, "widths", self.widths, right)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What was measured of one scheme, with the rules or without.

    Attributes:
      scheme, follows_rules: which models they are.
      widths: ascending.
      rms: root mean square of the stream after the embedding and after every block, after each step.
      change: the same of the difference to the stream before the first step.
      losses: of each step.
    """

    scheme: str
    follows_rules: bool
    widths: tuple[int, ...]
    rms: Float[np.ndarray, "widths updates places"]
    change: Float[np.ndarray, "widths updates places"]
    losses: Float[np.ndarray, "widths updates"]

    @property
    def spread(self) -> float:
        """The largest RMS over the smallest of all widths, of the block and the step where that is most."""
        blocks = self.rms[..., 1:]
        return float((blocks.max(0) / blocks.min(0)).max())

    @property
    def growth(self) -> float:
        """The change of the stream at the largest width over that at the smallest; the mean over blocks and steps."""
        ratio = self.change[-1, :, 1:] / self.change[0, :, 1:]
        return float(np.exp(np.log(ratio).mean()))


def run(arguments: Sequence[str]) -> list[Coordinates]:
    """Measure what `[CONFIG ...] [schemes=...] [widths=...] [updates=...] [key=value ...]` asks for.

    Prints a table, and whether the spread stays within LARGEST_SPREAD with the rules. Writes <out>/widths.json.

    Raises:
      ConfigError: one line, before anything is trained.
    """
    began = time.perf_counter()
    options, config = _read(arguments)
    out = Path(expanded(options.out))
    out.mkdir(parents=True, exist_ok=True)
    print(header(options))
    found = []
    for scheme, follows_rules in itertools.product(options.schemes, (True, False)):
        found.append(measure(config, options, scheme, follows_rules=follows_rules))
        print(row(found[-1]), flush=True)
    document = {
        "command": shlex.join(["hybridnorm", "lab", "widths", *arguments]),
        "options": dataclasses.asdict(options),
        "learning_rate": config.optimizer.learning_rate,
        "largest_spread": LARGEST_SPREAD,
        "measured": [_as_json(each) for each in found],
        "versions": {"jax": jax.__version__},
    }
    (out / "widths.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{out / 'widths.json'}, {time.perf_counter() - began:.0f} s")
    return found


def _read(arguments: Sequence[str]) -> tuple[WidthOptions, RunConfig]:
    """The options, and the configuration of which the models are.

    Raises:
      ConfigError, UserError: also for what would fail only after some models were trained.
    """
    options, others = take(WidthOptions, arguments)
    refuse(others, SET_HERE)
    config = parse([*USUAL, *others], DEFAULT)  # imports plugins, which may bring schemes
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    options = dataclasses.replace(options, widths=tuple(sorted(options.widths)))
    for scheme, width in itertools.product(options.schemes, options.widths):
        of_width(config, options, scheme, width, follows_rules=True)
    return options, config


def of_width(config: RunConfig, options: WidthOptions, scheme: str, width: int, *, follows_rules: bool) -> RunConfig:
    """The configuration of one model: the shape of config.model, with heads of one size, of which there are more.

    Raises:
      ConfigError: the widths are not whole numbers of heads, or the rules do not hold for this model.
    """
    model, base = config.model, options.widths[0]
    head_dim = base // min(model.num_heads, base)
    right = f"must be a multiple of {head_dim}, the width of a head (the smallest of widths over model.num_heads)"
    check(width % head_dim == 0, "widths", width, right)
    sizes = {
        "d_model": width,
        "head_dim": head_dim,
        "num_heads": width // head_dim,
        "num_kv_heads": None,
        "mlp_dim": round(model.mlp_dim * width / model.d_model),
        "shared_mlp_dim": _in_proportion(model.shared_mlp_dim, width / model.d_model),
        "dense_mlp_dim": _in_proportion(model.dense_mlp_dim, width / model.d_model),
    }
    scaled = model.with_scheme(scheme, **sizes, base_width=base if follows_rules else None)
    return dataclasses.replace(
        config,
        model=scaled,
        train=dataclasses.replace(
            config.train,
            steps=options.updates,
            batch_size=options.sequences,
            seq_len=options.seq_len,
            grad_accumulation=1,
            watch_every=None,
        ),
    )


def _in_proportion(size: int | None, factor: float) -> int | None:
    return None if size is None else round(size * factor)


def measure(config: RunConfig, options: WidthOptions, scheme: str, *, follows_rules: bool) -> Coordinates:
    """Train a model of each width, on one device.

    Args:
      follows_rules: whether the models have model.base_width.
    """
    each = [_trained(of_width(config, options, scheme, width, follows_rules=follows_rules)) for width in options.widths]
    rms, change, losses = (np.stack(values) for values in zip(*each, strict=True))
    return Coordinates(scheme, follows_rules, options.widths, rms, change, losses)


def _trained(config: RunConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RMS of the streams, RMS of their change, and the loss, after each step."""
    train = config.train
    batch = random_batch(config.model.vocab_size, train.batch_size, train.seq_len, train.seed)
    program = Program(config, make_mesh({}, jax.devices()[:1]))
    streams = _streams_of(config.model)
    state = program.fresh_state()
    start = streams(state.params, batch["tokens"], 0)
    rms, change, losses = [], [], []
    for step in range(1, train.steps + 1):
        state, metrics = program.train_step(state, {name: array[None] for name, array in batch.items()})
        now = streams(state.params, batch["tokens"], step)
        rms.append(_rms(now))
        change.append(_rms(now - start))
        losses.append(float(metrics["loss"]))
    return np.stack(rms), np.stack(change), np.array(losses)


def _streams_of(model: ModelConfig) -> Any:
    """(parameters, tokens, step) -> the stream after the embedding and after every block, in float64 NumPy."""
    decoder = Decoder(model)

    @jax.jit
    def sown(params, tokens, step):
        grown = {"step": step} if model.grows else {}
        _, collections = decoder.apply({"params": params}, tokens, mutable=[STREAM], **grown)
        return collections[STREAM]

    def streams(params, tokens, step):
        found = jax.device_get(sown(params, tokens, step))
        runs = [np.asarray(found[f"run_{number}"]["value"][0]) for number in range(len(model.runs))]
        return np.concatenate([found["value"][0][None], *runs]).astype(np.float64)

    return streams


def _rms(streams: Float[np.ndarray, "places batch seq embed"]) -> Float[np.ndarray, " places"]:
    return np.sqrt(np.square(streams).mean((1, 2, 3)))


def header(options: WidthOptions) -> str:
    """The table's first lines."""
    titles = "".join(f"{width:>10}" for width in options.widths)
    return (
        f"RMS of the stream after the last block, after {options.updates} steps at each width. spread: the largest\n"
        "RMS over the smallest of all widths, of the block and the step where that is most. growth: of the change of\n"
        "the stream from the smallest width to the largest, the mean over blocks and steps.\n\n"
        f"{'scheme':20}{'rules':>10}{titles}{'spread':>10}{'growth':>10}"
    )


def row(found: Coordinates) -> str:
    """One line of the table."""
    cells = "".join(f"{value:10.4g}" for value in found.rms[:, -1, -1])
    rules = "muP" if found.follows_rules else "none"
    verdict = ""
    if found.follows_rules:
        verdict = "" if found.spread <= LARGEST_SPREAD else f"  more than {LARGEST_SPREAD:g}"
    return f"{found.scheme:20}{rules:>10}{cells}{found.spread:10.3g}{found.growth:10.3g}{verdict}"


def _as_json(found: Coordinates) -> dict[str, Any]:
    values = {name: getattr(found, name).tolist() for name in ("rms", "change", "losses")}
    of = {"scheme": found.scheme, "follows_rules": found.follows_rules, "widths": found.widths}
    return of | {"spread": found.spread, "growth": found.growth} | values
