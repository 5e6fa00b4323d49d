"""Plants the directories of runs that were never trained, with known numbers."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.config import yaml_files
from hybridnorm_jax.config.run_config import RunConfig

STEPS, BATCH, LENGTH, LAYERS = 100, 4, 16, 3


@dataclasses.dataclass(frozen=True)
class Planted:
    """A run as the lab leaves it.

    Its gradient norms are 1, 2, ..., and its speed is 1000 + seed tokens per second.

    Attributes:
      loss: the validation loss at the end, and what the training loss falls to from 6; None: there is no evaluation.
      finished: whether it has a result.json.
      result: values that result.json has instead of the usual ones.
      name: of its directory; None: made of scheme, learning rate and seed.
      overrides: key=value of its configuration.
      curve: the training losses, instead of those that fall to `loss`.
      watched: whether its layers are watched, at its first and last line.
    """

    scheme: str = "pre"
    loss: float | None = None
    seed: int = 0
    rate: float = 1e-3
    diverged_at: int | None = None
    finished: bool = True
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    overrides: tuple[str, ...] = ()
    curve: Sequence[float] | None = None
    watched: bool = False


def plant(directory: Path, run: Planted) -> Path:
    """Write config.yaml, metrics.jsonl with every step's loss, and result.json if the run ended; returns its path."""
    path = directory / (run.name or f"{run.scheme}-{run.rate:g}-{run.seed}")
    path.mkdir(parents=True)
    config = _config(run)
    (path / "config.yaml").write_text(yaml_files.to_yaml(config))
    curve = _curve(run, config.train.steps) if run.curve is None else run.curve
    lines = list(_lines(run, curve, config))
    if run.finished and run.diverged_at is None and run.loss is not None:
        lines.append({"step": config.train.steps, "eval/validation/loss": run.loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if run.finished:
        result = _result(run, config, tokens=len(curve) * config.tokens_per_step)
        (path / "result.json").write_text(json.dumps(result))
    return path


def _config(run: Planted) -> RunConfig:
    settings = [
        f"model.scheme={run.scheme}",
        f"optimizer.learning_rate={run.rate}",
        f"train.seed={run.seed}",
        f"model.num_layers={LAYERS}",
        "model.d_model=16",
        "model.num_heads=2",
        "model.vocab_size=257",
        f"train.steps={STEPS}",
        f"train.batch_size={BATCH}",
        f"train.seq_len={LENGTH}",
        "train.log_every=10",
    ]
    return yaml_files.build(yaml_files.gather([], [*settings, *run.overrides]))


def _curve(run: Planted, steps: int) -> list[float]:
    end = 5.0 if run.loss is None else run.loss
    return [end + (6 - end) * math.exp(-8 * step / steps) for step in range(1, steps + 1)]


def _result(run: Planted, config: RunConfig, *, tokens: int) -> dict[str, Any]:
    has_diverged = run.diverged_at is not None
    usual = {
        "status": "diverged" if has_diverged else "finished",
        "step": run.diverged_at if has_diverged else config.train.steps,
        "diverged_at": run.diverged_at,
        "scores": {} if has_diverged else {"validation": {"loss": run.loss, "tokens": 320}},
        "train_tokens": 3200,
        "tokens": tokens,
        "seconds": 60.0 + run.seed,
        "resumed_from": 0,
        "hardware": "cpu x 1 (test)",
        "versions": {"jax": "0.10.2"},
        "command": f"hybridnorm lab compare model.scheme={run.scheme} train.seed={run.seed}",
    }
    return usual | run.result


def _lines(run: Planted, curve: Sequence[float], config: RunConfig) -> Iterator[dict[str, Any]]:
    every = config.train.log_every
    for first in range(0, len(curve), every):
        losses = [value if math.isfinite(value) else None for value in curve[first : first + every]]
        step = first + len(losses)
        norms = [float(number) for number in range(first + 1, step + 1)]
        yield {
            "step": step,
            "train/loss": losses[-1],
            "train/losses": losses,
            "train/grad_norm": norms[-1],
            "train/grad_norms": norms,
            "tokens_per_second": 1000.0 + run.seed,
            "time/step_seconds": [config.tokens_per_step / (1000.0 + run.seed)] * len(losses),
        }
        if run.watched and (first == 0 or step == len(curve)):
            yield {"step": step, **_watched(config.model.num_layers, step)}


def _watched(count: int, step: int) -> dict[str, list]:
    stream = [step * (1.0 + layer) for layer in range(count + 1)]
    blocks = stream[:count]
    return {
        "watch/stream_rms": stream,
        "watch/token_similarity": [0.1] * (count + 1),
        "watch/stream_gradient": stream,
        "watch/attention_entropy": blocks,
        "watch/largest_logit": blocks,
        "watch/gradient/block": blocks,
        "watch/parameter/block": blocks,
        "watch/update/block": [0.01 * value for value in blocks],
        "watch/gradient/attention/query": [None] * count,
    }
