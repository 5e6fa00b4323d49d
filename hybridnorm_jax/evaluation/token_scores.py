"""How probable a model finds given continuations, many at once, sorted by length: one compiled program for each length.

A length is rounded up, so that there are few. The programs lie on the mesh of the parameters. With several processes
all of them score the same requests together, each its share of every batch, and all get all results.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.evaluation.token_requests import Piece, Request, pieces
from hybridnorm_jax.kernels.attention_backends import sequence_multiple
from hybridnorm_jax.mesh.batch_shares import batch_parts, batch_sharding, batch_share
from hybridnorm_jax.mesh.device_mesh import parts_of, use_mesh
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules, first_entry
from hybridnorm_jax.mesh.split_axes import parts, split_axes
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.loss import gathered_head, in_chunks
from hybridnorm_jax.model.program_lengths import rounded_up

# Of short sequences a device gets no more than this at a time, so that few requests are not lost in one large batch.
MOST_ROWS = 32
# Logits that a device holds at a time; 128 MiB in float32.
MOST_LOGITS = 1 << 25


class TokenScore(NamedTuple):
    """Of one continuation.

    Attributes:
      log_likelihood: log of its probability after its context, in nats.
      is_greedy: whether each of its tokens is the likeliest after those before it.
    """

    log_likelihood: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """A piece of request number `request`."""

    request: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that are scored at once, in a program for `length` inputs."""

    length: int
    rows: list[_Row]


class TokenScorer:
    """Scores continuations with a model on a mesh.

    Attributes:
      window: the most tokens that the model reads at once.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        rules: Rules = RULES,
        *,
        window: int,
        batch_size: int,
    ):
        """Compile nothing yet.

        Args:
          model: computes attention by the backend that its config names, which is not "auto".
          mesh: where the parameters lie; `rules` say how.
          window: the most tokens that the model reads at once; what fits the model and the mesh.
          batch_size: sequences of `window` tokens that fit into memory, over all devices. Of shorter ones more are
            scored at a time.
        """
        self.window = window
        self._mesh, self._rules = mesh, rules
        self._vocab_size = model.config.vocab_size
        self._parts = batch_parts(mesh, rules)
        self._tokens_of_part = max(batch_size // self._parts, 1) * window
        stretches = parts_of(first_entry(rules, "seq"), mesh)
        self._multiple = 2 * stretches * sequence_multiple(model.config.attention) if stretches > 1 else 1
        self._stretches = stretches
        # The rotation of such a model depends on how long a text is, so the filling behind it must not count.
        self._states_positions = model.config.length_of_short_factors is not None
        # All processes read all results.
        whole = NamedSharding(mesh, PartitionSpec())
        self._score = jax.jit(partial(_score_rows, model), static_argnames="chunk", out_shardings=whole)

    def score(
        self,
        params: Any,
        requests: Sequence[Request],
        *,
        stride: int | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[TokenScore]:
        """The score of every request, in their order.

        Args:
          params: of the model, on the mesh.
          requests: their contexts are not empty.
          stride: of continuations that are longer than the window (token_requests.pieces).
          before_batch: is called before each batch.

        Raises:
          UserError: a token is not in the vocabulary.
        """
        self._check_vocabulary(requests)
        sums, is_greedy = [0.0] * len(requests), [True] * len(requests)
        started = self._started(params, self._batches(requests, stride), before_batch)
        for batch, likelihoods, greedy in _one_batch_late(started):
            for row, likelihood, matches in zip(batch.rows, likelihoods, greedy, strict=False):
                sums[row.request] += float(likelihood)
                is_greedy[row.request] &= bool(matches)
        return [TokenScore(*each) for each in zip(sums, is_greedy, strict=True)]

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return self._score._cache_size()

    def _batches(self, requests: Sequence[Request], stride: int | None) -> Iterator[_Batch]:
        """Batches of rows of similar length, the longest first: what needs too much memory does so at once."""
        by_length: dict[int, list[_Row]] = {}
        for number, request in enumerate(requests):
            for piece in pieces(request, window=self.window, stride=stride):
                by_length.setdefault(self._rounded_up(len(piece.inputs)), []).append(_Row(number, piece))
        for length in sorted(by_length, reverse=True):
            rows, count = by_length[length], self._rows_at_a_time(length)
            for first in range(0, len(rows), count):
                yield _Batch(length, rows[first : first + count])

    def _started(
        self, params: Any, batches: Iterable[_Batch], before_batch: Callable[[], None]
    ) -> Iterator[tuple[_Batch, Array, Array]]:
        for batch in batches:
            before_batch()
            yield self._run(params, batch)

    def _run(self, params: Any, batch: _Batch) -> tuple[_Batch, Array, Array]:
        """Start a batch; its results are on the devices."""
        count = self._rows_at_a_time(batch.length)
        share = batch_share(self._mesh, self._rules)
        local = count // share.count
        own = batch.rows[share.number * local : (share.number + 1) * local]
        pieces_of_own = [row.piece for row in own]
        arrays = _arrays(pieces_of_own, rows_in_all=local, length=batch.length)
        if self._states_positions:
            arrays["positions"] = _positions(pieces_of_own, rows_in_all=local, length=batch.length)
        place = batch_sharding(self._mesh, 0, self._rules)
        with use_mesh(self._mesh, self._rules):
            placed = {name: jax.make_array_from_process_local_data(place, each) for name, each in arrays.items()}
            likelihoods, is_greedy = self._score(params, placed, chunk=self._chunk(batch.length))
        return batch, likelihoods, is_greedy

    def _rounded_up(self, length: int) -> int:
        """The length of the program that reads `length` tokens: no more than the window, as the mesh splits it."""
        whole_window = -(-self.window // self._multiple) * self._multiple
        return min(rounded_up(length, multiple=self._multiple), whole_window)

    def _rows_at_a_time(self, length: int) -> int:
        """Rows of a batch; the same for all batches of a length."""
        return self._parts * min(max(self._tokens_of_part // length, 1), MOST_ROWS)

    def _chunk(self, length: int) -> int:
        """Positions whose logits are held at a time."""
        rows = self._rows_at_a_time(length) // self._parts
        divisors = [size for size in range(self._stretches, length + 1, self._stretches) if length % size == 0]
        small = [size for size in divisors if rows * size * self._vocab_size <= MOST_LOGITS]
        return max(small, default=divisors[0])

    def _check_vocabulary(self, requests: Sequence[Request]) -> None:
        largest = max((max((*request.context, *request.continuation)) for request in requests), default=0)
        if largest >= self._vocab_size:
            right = "data.tokenizer is not that of this model"
            raise UserError(f"token {largest} is outside model.vocab_size={self._vocab_size}; {right}")


def _score_rows(
    model: Decoder, params: Any, batch: dict[str, Array], *, chunk: int
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """(sum of the log-probabilities of a row's targets, whether all are the likeliest); chunk: as in in_chunks."""
    params = {**params, **gathered_head(model.config, params)}
    hidden = model.apply({"params": params}, batch["tokens"], positions=batch.get("positions"), method="hidden")

    def add(sums: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        hidden, targets, is_target = piece
        logits = model.apply({"params": params}, hidden, method="logits")
        likelihoods, is_greedy = _score_logits(logits, targets, is_target)
        return (sums[0] + likelihoods, sums[1] & is_greedy), None

    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    rows, seq = batch["tokens"].shape
    stretches = parts(split_axes("seq", seq))
    arrays = (hidden, batch["targets"], batch["is_target"])
    start = jnp.zeros(rows, dtype), jnp.ones(rows, bool)
    sums, _ = jax.lax.scan(add, start, tuple(in_chunks(each, chunk, stretches) for each in arrays))
    return sums


def _score_logits(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"], is_target: Bool[Array, "batch seq"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Of each row the sum of log softmax(logits)[target], and whether every target is the first largest logit."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likelihoods = chosen - jax.nn.logsumexp(logits, axis=-1)
    is_greedy = jnp.argmax(logits, axis=-1) == targets
    return jnp.where(is_target, likelihoods, 0).sum(-1), (is_greedy | ~is_target).all(-1)


def _arrays(rows: Sequence[Piece], *, rows_in_all: int, length: int) -> dict[str, np.ndarray]:
    """The rows with zeros behind them, where a causal model does not look, and rows without targets below them."""
    tokens, targets = np.zeros((2, rows_in_all, length), np.int32)
    is_target = np.zeros((rows_in_all, length), bool)
    for number, piece in enumerate(rows):
        end = len(piece.inputs)
        places = slice(end - len(piece.targets), end)
        tokens[number, :end] = piece.inputs
        # The logits of a position are those of the token after it.
        targets[number, places] = piece.targets
        is_target[number, places] = True
    return {"tokens": tokens, "targets": targets, "is_target": is_target}


def _positions(rows: Sequence[Piece], *, rows_in_all: int, length: int) -> np.ndarray:
    """Positions of the rows' tokens; what stands behind a row repeats its last one."""
    last = np.zeros((rows_in_all, 1), np.int32)
    last[: len(rows), 0] = [len(piece.inputs) - 1 for piece in rows]
    return np.minimum(np.arange(length, dtype=np.int32), last)


def _one_batch_late(
    started: Iterator[tuple[_Batch, Array, Array]],
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """The results of each batch, after the next one was started: the device then has work while they are read."""
    before = None
    for each in started:
        if before is not None:
            yield before[0], np.asarray(before[1]), np.asarray(before[2])
        before = each
    if before is not None:
        yield before[0], np.asarray(before[1]), np.asarray(before[2])
