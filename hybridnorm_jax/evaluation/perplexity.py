"""Loss, perplexity and bits per byte of validation sets."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from hybridnorm_jax.data import Windows, validation_batches
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.mesh.batch_shares import WHOLE_BATCH, BatchShare
from hybridnorm_jax.model.loss import LossSums
from hybridnorm_jax.streams import can_redraw


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts one validation set.

    Attributes:
      loss: nats per token.
      perplexity: exp(loss).
      bits_per_byte: loss / (ln 2 * bytes per token of the set); None where the set's bytes are unknown.
      tokens: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int

    def as_json(self) -> dict[str, float | int | None]:
        """The fields as JSON has them, with null for what is not finite."""
        values = dataclasses.asdict(self)
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


Batch = dict[str, Any]
# The loss sums of one batch, on the device.
EvalStep = Callable[[Batch], LossSums]


def evaluate(eval_step: EvalStep, batches: Iterable[Batch], *, bytes_per_token: float | None = None) -> Score:
    """Score all batches together: their sums are added in double precision and divided once.

    Raises:
      UserError: no target has a weight.
    """
    nll = weight = 0.0
    for sums in _one_batch_late(eval_step, batches):
        nll += float(sums.nll)
        weight += float(sums.weight)
    if not weight:
        raise UserError(
            "validation: no target has a weight; with data.segment_ids=true every document is one token long"
        )
    loss = nll / weight
    return Score(
        loss=loss,
        # A double ends at e^709; the perplexity of such a model means nothing.
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=None if bytes_per_token is None else loss / math.log(2) / bytes_per_token,
        tokens=round(weight),
    )


def _one_batch_late(eval_step: EvalStep, batches: Iterable[Batch]) -> Iterator[LossSums]:
    """The sums of each batch, after the next one was started: the device then has work while they are read."""
    started = None
    for batch in batches:
        ready, started = started, eval_step(batch)
        if ready is not None:
            yield ready
    if started is not None:
        yield started


def evaluate_sets(
    eval_step: EvalStep,
    sets: Mapping[str, Windows],
    *,
    batch_size: int,
    share: BatchShare = WHOLE_BATCH,
    sequences: int | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """The score of every validation set.

    Args:
      eval_step: takes this process's part of a batch, and returns the loss sums of the whole batch.
      batch_size: sequences per batch, over all processes.
      share: the stretch of every batch that this process reads.
      sequences: how many of each set, its first; None: all. What is left of the last batch is filled up with sequences
        of weight 0, so the score does not depend on batch_size.
      progress: whether a terminal shows a progress bar.
    """
    scores = {}
    for name, windows in sets.items():
        scored = windows if sequences is None else _First(windows, sequences)
        stream = validation_batches(scored, batch_size=batch_size, share=share)
        shown = tqdm(
            stream,
            desc=f"eval {name}",
            total=math.ceil(len(scored) / batch_size),
            leave=False,
            disable=not (progress and can_redraw(sys.stderr)),
            dynamic_ncols=True,
        )
        scores[name] = evaluate(eval_step, shown, bytes_per_token=windows.bytes_per_token)
    return scores


class _First:
    """The first rows of a set."""

    def __init__(self, windows: Windows, count: int):
        self._windows, self._count = windows, min(count, len(windows))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._windows[index]


def table(scores: Mapping[str, Score]) -> str:
    """The scores as aligned text, one line per set."""
    width = max(len(title) for title in ["set", *scores])
    lines = [f"{'set':<{width}}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>12}"]
    for name, score in scores.items():
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        lines.append(f"{name:<{width}}  {score.loss:8.4f}  {score.perplexity:10.4g}  {bits:>9}  {score.tokens:12,}")
    return "\n".join(lines)
