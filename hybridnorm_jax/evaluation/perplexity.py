"""Loss, perplexity, perplexity of words and bits per byte of validation sets."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from hybridnorm_jax.data import Rows, validation_batches
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
      word_perplexity: exp(loss / words per token of the set), where whitespace separates words: of a whole set
        exp(-log-likelihood / words), as the harness has it. None where the set's words are unknown.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    word_perplexity: float | None = None

    def as_json(self) -> dict[str, float | int | None]:
        """The fields as JSON has them, with null for what is not finite."""
        values = dataclasses.asdict(self)
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


# The mean of a mixture's sources, in the place of the one held-out set that other runs have.
MEAN = "validation"
Batch = dict[str, Any]
# The loss sums of one batch, on the device.
EvalStep = Callable[[Batch], LossSums]


def evaluate(
    eval_step: EvalStep,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float | None = None,
    words_per_token: float | None = None,
) -> Score:
    """Score all batches together: their sums are added in double precision and divided once.

    Args:
      eval_step: the loss sums of a batch.
      batches: of one set.
      bytes_per_token, words_per_token: of the set; None: unknown.

    Raises:
      UserError: no target has a weight.
    """
    (score,) = evaluate_models(
        eval_step, batches, models=1, bytes_per_token=bytes_per_token, words_per_token=words_per_token
    )
    return score


def evaluate_models(
    eval_step: EvalStep,
    batches: Iterable[Batch],
    *,
    models: int,
    bytes_per_token: float | None = None,
    words_per_token: float | None = None,
) -> list[Score]:
    """As `evaluate`, of several models at once.

    Args:
      eval_step: the loss sums of a batch, with a number for each model.
      models: how many there are.
    """
    nll, weight = np.zeros(models), np.zeros(models)
    for sums in _one_batch_late(eval_step, batches):
        nll += np.asarray(sums.nll, np.float64)
        weight += np.asarray(sums.weight, np.float64)
    if not weight.all():
        raise UserError(
            "validation: no target has a weight; with data.segment_ids=true every document is one token long"
        )
    return [
        _score(float(of_model), float(of_targets), bytes_per_token, words_per_token)
        for of_model, of_targets in zip(nll, weight, strict=True)
    ]


def _score(nll: float, weight: float, bytes_per_token: float | None, words_per_token: float | None) -> Score:
    loss = nll / weight
    return Score(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=None if bytes_per_token is None else loss / math.log(2) / bytes_per_token,
        word_perplexity=_exp(loss / words_per_token) if words_per_token else None,
        tokens=round(weight),
    )


def _exp(nats: float) -> float:
    """A double ends at e^709; a perplexity like that means nothing."""
    return math.exp(min(nats, 700.0))


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
    sets: Mapping[str, Rows],
    *,
    batch_size: int,
    share: BatchShare = WHOLE_BATCH,
    sequences: int | None = None,
    stride: int | None = None,
    mixed: Mapping[str, float] | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """The score of every validation set.

    Args:
      eval_step: takes this process's part of a batch, and returns the loss sums of the whole batch.
      batch_size: sequences per batch, over all processes.
      share: the stretch of every batch that this process reads.
      sequences: how many of each set, its first; None: all. What is left of the last batch is filled up with sequences
        of weight 0, so the score does not depend on batch_size.
      stride: see Rows.with_stride; None: sequences do not overlap.
      mixed: of a mixture the share of each source in the run: their mean is the score "validation"; None: it is none.
      progress: whether a terminal shows a progress bar.
    """
    (scores,) = evaluate_sets_of_models(
        eval_step,
        sets,
        models=1,
        batch_size=batch_size,
        share=share,
        sequences=sequences,
        stride=stride,
        mixed=mixed,
        progress=progress,
    )
    return scores


def evaluate_sets_of_models(
    eval_step: EvalStep,
    sets: Mapping[str, Rows],
    *,
    models: int,
    batch_size: int,
    share: BatchShare = WHOLE_BATCH,
    sequences: int | None = None,
    stride: int | None = None,
    mixed: Mapping[str, float] | None = None,
    progress: bool = True,
) -> list[dict[str, Score]]:
    """As `evaluate_sets`, of several models at once.

    Args:
      eval_step, models: as in evaluate_models.
    """
    scores: list[dict[str, Score]] = [{} for _ in range(models)]
    for name, windows in sets.items():
        scored = windows if stride is None else windows.with_stride(stride)
        if sequences is not None:
            scored = _First(scored, sequences)
        stream = validation_batches(scored, batch_size=batch_size, share=share)
        shown = tqdm(
            stream,
            desc=f"eval {name}",
            total=math.ceil(len(scored) / batch_size),
            leave=False,
            disable=not (progress and can_redraw(sys.stderr)),
            dynamic_ncols=True,
        )
        of_set = evaluate_models(
            eval_step,
            shown,
            models=models,
            bytes_per_token=windows.bytes_per_token,
            words_per_token=windows.words_per_token,
        )
        for of_model, score in zip(scores, of_set, strict=True):
            of_model[name] = score
    return scores if mixed is None else [{MEAN: mean_score(one, mixed), **one} for one in scores]


def mean_score(scores: Mapping[str, Score], shares: Mapping[str, float]) -> Score:
    """The mean loss of some sets, each weighted by its share.

    There is no text of such a mixture, so nothing is known of its bytes and words.

    Args:
      shares: of each set; their sum is 1.
    """
    loss = math.fsum(share * scores[name].loss for name, share in shares.items())
    tokens = sum(scores[name].tokens for name in shares)
    return Score(loss=loss, perplexity=_exp(loss), bits_per_byte=None, tokens=tokens)


class _First:
    """The first rows of a set."""

    def __init__(self, windows: Rows, count: int):
        self._windows, self._count = windows, min(count, len(windows))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._windows[index]


def table(scores: Mapping[str, Score]) -> str:
    """The scores as aligned text, one line per set."""
    width = max(len(title) for title in ["set", *scores])
    titles = f"{'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'of words':>10}  {'tokens':>12}"
    lines = [f"{'set':<{width}}  {titles}"]
    for name, score in scores.items():
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        words = "-" if score.word_perplexity is None else f"{score.word_perplexity:.4g}"
        numbers = f"{score.loss:8.4f}  {score.perplexity:10.4g}  {bits:>9}  {words:>10}  {score.tokens:12,}"
        lines.append(f"{name:<{width}}  {numbers}")
    return "\n".join(lines)
