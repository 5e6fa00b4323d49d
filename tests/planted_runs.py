"""Plants the directories of runs that were never trained, with known numbers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from hybridnorm_jax.config import yaml_files
from hybridnorm_jax.config.run_config import RunConfig

STEPS, BATCH, LENGTH, LAYERS = 100, 4, 16, 3


def plant(
    directory: Path,
    scheme: str = "pre",
    *,
    loss: float | None,
    seed: int = 0,
    rate: float = 1e-3,
    diverged_at: int | None = None,
    finished: bool = True,
    result: dict | None = None,
    name: str | None = None,
    overrides: tuple[str, ...] = (),
    curve: list[float] | None = None,
    watched: bool = False,
) -> Path:
    """A run as the lab leaves it: config.yaml, metrics.jsonl with every step's loss, and result.json if it ended.

    Its training loss falls from 6 to `loss` (or follows `curve`), its gradient norms are 1, 2, ..., its speed is
    1000 + seed tokens per second, and its layers are watched, if asked, at its first and last line.
    """
    path = directory / (name or f"{scheme}-{rate:g}-{seed}")
    path.mkdir(parents=True)
    words = [f"model.scheme={scheme}", f"optimizer.learning_rate={rate}", f"train.seed={seed}"]
    words += [f"model.num_layers={LAYERS}", "model.d_model=16", "model.num_heads=2", "model.vocab_size=257"]
    words += [f"train.steps={STEPS}", f"train.batch_size={BATCH}", f"train.seq_len={LENGTH}", "train.log_every=10"]
    config = yaml_files.build(yaml_files.gather([], [*words, *overrides]))
    (path / "config.yaml").write_text(yaml_files.to_yaml(config))
    steps = config.train.steps
    end = 5.0 if loss is None else loss
    curve = curve or [end + (6 - end) * math.exp(-8 * step / steps) for step in range(1, steps + 1)]
    lines = list(_lines(curve, config, seed, watched))
    if finished and diverged_at is None and loss is not None:
        lines.append({"step": steps, "eval/validation/loss": loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        ended = {
            "status": "finished" if diverged_at is None else "diverged",
            "step": steps if diverged_at is None else diverged_at,
            "diverged_at": diverged_at,
            "scores": {} if diverged_at is not None else {"validation": {"loss": loss, "tokens": 320}},
            **{"train_tokens": 3200, "tokens": len(curve) * config.tokens_per_step, "seconds": 60.0 + seed},
            **{"resumed_from": 0, "hardware": "cpu x 1 (test)", "versions": {"jax": "0.10.2"}},
            "command": f"hybridnorm lab compare model.scheme={scheme} train.seed={seed}",
        }
        (path / "result.json").write_text(json.dumps(ended | (result or {})))
    return path


def _lines(curve: list[float], config: RunConfig, seed: int, watched: bool) -> Iterator[dict]:
    every = config.train.log_every
    for first in range(0, len(curve), every):
        losses = [value if math.isfinite(value) else None for value in curve[first : first + every]]
        step = first + len(losses)
        norms = [float(number) for number in range(first + 1, step + 1)]
        yield {
            **{"step": step, "train/loss": losses[-1], "train/losses": losses},
            **{"train/grad_norm": norms[-1], "train/grad_norms": norms, "tokens_per_second": 1000.0 + seed},
        }
        if watched and (first == 0 or step == len(curve)):
            yield {"step": step, **_watched(config.model.num_layers, step)}


def _watched(count: int, step: int) -> dict[str, list]:
    stream = [step * (1.0 + layer) for layer in range(count + 1)]
    blocks = stream[:count]
    return {
        **{"watch/stream_rms": stream, "watch/token_similarity": [0.1] * (count + 1), "watch/stream_gradient": stream},
        **{"watch/attention_entropy": blocks, "watch/largest_logit": blocks, "watch/gradient/block": blocks},
        **{"watch/parameter/block": blocks, "watch/update/block": [0.01 * value for value in blocks]},
        "watch/gradient/attention/query": [None] * count,
    }
