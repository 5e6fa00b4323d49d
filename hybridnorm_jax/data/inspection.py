"""Rows as the model sees them, in words; and how fast they are read."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hybridnorm_jax.data.rows.rows import Rows
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer

# Tokens at both ends of a segment that are shown.
SHOWN = 8
# Rows of which shares are counted, spread evenly over all.
SAMPLED = 256


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of sampled rows.

    Attributes:
      padding: positions that hold no token.
      without_loss: positions that hold a token whose target counts nothing, as where another document begins.
      documents: that a row has parts of, on average; None where rows do not say.
    """

    padding: float
    without_loss: float
    documents: float | None


def shares(rows: Rows) -> Shares:
    """The shares of up to SAMPLED rows."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows)), dtype=np.int64)).tolist()
    padding = without_loss = segments = 0.0
    positions, knows = 0, False
    for place in places:
        row = rows[place]
        ids = row.get("segment_ids")
        knows = ids is not None
        empty = ids == 0 if knows else _trailing_zeros(row)
        padding += int(empty.sum())
        without_loss += int((~empty & (row["weights"] == 0)).sum())
        segments += int(ids.max()) if knows else 0
        positions += len(row["tokens"])
    return Shares(padding / positions, without_loss / positions, segments / len(places) if knows else None)


def _trailing_zeros(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions at the end of a row in which nothing is predicted of nothing: what fills it up."""
    blank = (row["weights"] == 0) & (row["tokens"] == 0) & (row["targets"] == 0)
    return np.cumprod(blank[::-1])[::-1].astype(bool)


def describe(row: Mapping[str, np.ndarray], tokenizer: Tokenizer | None) -> Iterator[str]:
    """Lines about one row: its segments with their positions, the targets that count, and the tokens at both ends."""
    count = len(row["tokens"])
    ids = row.get("segment_ids", np.where(_trailing_zeros(row), 0, 1))
    cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), count]
    for start, stop in itertools.pairwise(cuts):
        tokens, targets = row["tokens"][start:stop], int((row["weights"][start:stop] > 0).sum())
        if ids[start] == 0:
            yield f"  padding: {stop - start:,} positions"
            continue
        positions = row["positions"][start:stop] if "positions" in row else np.arange(start, stop)
        yield (
            f"  segment {ids[start]}: {stop - start:,} tokens, positions {positions[0]:,} to {positions[-1]:,}, "
            f"{targets:,} targets count"
        )
        for name, part in (("begins", tokens[:SHOWN]), ("ends", tokens[-SHOWN:])):
            yield f"    {name:6} {_shown(part, tokenizer)}"


def _shown(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    ids = " ".join(str(token) for token in tokens.tolist())
    return ids if tokenizer is None else f"{json.dumps(_decoded(tokens, tokenizer), ensure_ascii=False)}  {ids}"


def _decoded(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with the separators, which `decode` leaves out."""
    if tokenizer.separator_id is None:
        return tokenizer.decode(tokens)
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.separator_id) + 1)
    texts = [tokenizer.decode(part) for part in parts]
    ends = [tokenizer.separator if len(part) and part[-1] == tokenizer.separator_id else "" for part in parts]
    return "".join(text + end for text, end in zip(texts, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast batches are read: tokens each second, and each second of one core's work, of all threads together."""

    per_second: float
    per_core: float


def measure_rate(batches: Iterator[Mapping[str, np.ndarray]], seconds: float) -> Rate:
    """The rate of an endless stream of batches, after its first one."""
    next(batches)
    began, worked, tokens = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - began) < seconds or not tokens:
        tokens += next(batches)["tokens"].size
    return Rate(tokens / passed if passed else 0.0, tokens / max(time.process_time() - worked, 1e-9))


def first_rows(batch: Mapping[str, np.ndarray], count: int) -> Sequence[dict[str, np.ndarray]]:
    """The first rows of a batch of arrays (accumulation, microbatch, seq_len)."""
    flat = {name: values.reshape(-1, values.shape[-1]) for name, values in batch.items()}
    most = min(count, len(flat["tokens"]))
    return [{name: values[place] for name, values in flat.items()} for place in range(most)]
