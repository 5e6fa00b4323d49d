"""Loss, perplexity and bits per byte of validation sets."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping

from tqdm import tqdm

from hybridnorm_jax.data import Windows, validation_batches
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.mesh.batch_shares import WHOLE_BATCH, BatchShare
from hybridnorm_jax.model.loss import LossSums


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts one validation set.

    Attributes:
      loss: nats per token.
      perplexity: exp(loss).
      bits_per_byte: loss / (ln 2 * bytes per token of the set), or None where the set's bytes are unknown.
      tokens: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def evaluate(
    eval_step: Callable[[dict], LossSums], batches: Iterable[dict], *, bytes_per_token: float | None = None
) -> Score:
    """Score all batches: sums of each on the device, added up in double precision, divided once."""
    nll = weight = 0.0
    late = None
    for batch in batches:
        sums, late = late, eval_step(batch)
        if sums is not None:
            nll, weight = nll + float(sums.nll), weight + float(sums.weight)
    nll, weight = nll + float(late.nll), weight + float(late.weight)
    if not weight:
        raise UserError(
            "validation: no target has a weight; with data.segment_ids=true every document is one token long"
        )
    loss = nll / weight
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    # Beyond e^700 a double ends; such a model has no perplexity worth a digit.
    return Score(loss, math.exp(min(loss, 700.0)), bits, round(weight))


def evaluate_sets(
    eval_step: Callable[[dict], LossSums],
    sets: Mapping[str, Windows],
    *,
    batch_size: int,
    share: BatchShare = WHOLE_BATCH,
    batches: int | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """The score of every validation set; on a terminal with a progress bar.

    Args:
      eval_step: loss sums of this process's part of a batch.
      batch_size: sequences per batch, over all processes.
      share: the stretch of every batch that this process reads.
      batches: how many of each set, in order; None: all.
    """
    scores = {}
    for name, windows in sets.items():
        stream = validation_batches(windows, batch_size=batch_size, batches=batches, share=share)
        total = math.ceil(len(windows) / batch_size)
        total = total if batches is None else min(total, batches)
        shown = progress and sys.stderr.isatty()
        bar = tqdm(stream, f"eval {name}", total=total, leave=False, disable=not shown, dynamic_ncols=True)
        scores[name] = evaluate(eval_step, bar, bytes_per_token=windows.bytes_per_token)
    return scores


def table(scores: Mapping[str, Score]) -> str:
    """The scores as aligned text, one line per set."""
    width = max(len("set"), *map(len, scores))
    lines = [f"{'set':<{width}}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>12}"]
    for name, score in scores.items():
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        lines.append(f"{name:<{width}}  {score.loss:8.4f}  {score.perplexity:10.4g}  {bits:>9}  {score.tokens:12,}")
    return "\n".join(lines)
