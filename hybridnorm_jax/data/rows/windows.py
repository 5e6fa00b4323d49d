"""Fixed windows over one long stream of tokens."""

from typing import Self

import numpy as np

from hybridnorm_jax.data.tokens.token_stream import TokenStream


class Windows:
    """A random-access source of rows of `seq_len` inputs and targets.

    Row i covers tokens [i seq_len, i seq_len + seq_len] and runs across documents. So every token but the very first is
    a target once. A row is a dict of arrays (seq_len,): `tokens` int32, `targets` int32 (the following token) and
    `weights` float32. With `segment_ids` it also has `segment_ids` int32, which count the row's documents from 1,
    and `positions` int32, which restart at 0 in each document. A token `separator_id` ends the document it belongs to.
    Where a file has an index of its documents, that says where they end, and not separators. A file ends a document,
    also without a separator, and so does a held-out part. A target in another document than its input has weight 0, and
    so has one that is not learned (Extent.targets).

    Without `tail` the tokens after the last full row are dropped; with it they make one more row, filled up with
    zeros (weight 0, segment 0).

    With a `stride` below seq_len rows overlap: row i covers tokens [i stride, i stride + seq_len]. What an earlier row
    has as a target has weight 0. So every token is still a target once, and those after the first row are predicted
    from at least seq_len - stride tokens before them.

    Attributes:
      num_tokens: tokens of the stream, separators included.
      padding, tokens_of_rows: as those of Rows, where there is no tail.
      bytes_per_token: bytes of text per token of the stream; None where unknown.
      words_per_token: words, which whitespace separates, per token of the stream; None where unknown.
    """

    padding = 0.0
    tokens_of_rows = None

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        tail: bool,
        segment_ids: bool = False,
        separator_id: int | None = None,
        bytes_per_token: float | None = None,
        words_per_token: float | None = None,
        stride: int | None = None,
    ):
        self._stream = stream
        self._seq_len = seq_len
        self._tail = tail
        self._stride = seq_len if stride is None else stride
        self._segment_ids = segment_ids
        self._separator_id = separator_id
        self.num_tokens = len(stream)
        self.bytes_per_token = bytes_per_token
        self.words_per_token = words_per_token
        # The first row has seq_len new targets, each further one `stride`.
        targets = max(self.num_tokens - 1, 0)
        further = max(targets - seq_len, 0)
        if tail:
            self._num_rows = min(targets, 1) + -(-further // self._stride)
        else:
            self._num_rows = (1 if targets >= seq_len else 0) + further // self._stride

    def with_stride(self, stride: int | None) -> Self:
        """The same tokens in rows that overlap; None: in rows that do not."""
        return type(self)(
            self._stream,
            seq_len=self._seq_len,
            tail=self._tail,
            segment_ids=self._segment_ids,
            separator_id=self._separator_id,
            bytes_per_token=self.bytes_per_token,
            words_per_token=self.words_per_token,
            stride=stride,
        )

    def beginning(self, count: int) -> np.ndarray:
        """The first `count` tokens, fewer where there are not so many."""
        return self._stream.read(0, min(count, self.num_tokens))

    def drawn(self, index: int, *, seed: int, epoch: int) -> dict[str, np.ndarray]:
        """See Rows."""
        return self[index]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self._stride
        tokens = self._stream.read(start, min(start + self._seq_len + 1, self.num_tokens))
        row = {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "weights": np.ones(len(tokens) - 1, np.float32),
        }
        if self._segment_ids:
            row |= _documents(self._stream.begins(start, tokens, self._separator_id))
        if self._stream.has_targets:
            row["weights"] = row["weights"] * self._stream.targets(start + 1, start + len(tokens))
        if index > 0:
            row["weights"][: self._seq_len - self._stride] = 0
        missing = self._seq_len - len(row["tokens"])
        if missing == 0:
            return row
        return {name: np.pad(values, (0, missing)) for name, values in row.items()}


def _documents(begins: np.ndarray) -> dict[str, np.ndarray]:
    """Weights, segment ids and positions of a row of inputs and their last target, by which of them begin documents."""
    document = np.cumsum(begins)
    index = np.arange(len(begins))
    positions = index - np.maximum.accumulate(np.where(begins, index, 0))
    return {
        "weights": (document[1:] == document[:-1]).astype(np.float32),
        "segment_ids": (document[:-1] + 1).astype(np.int32),
        "positions": positions[:-1].astype(np.int32),
    }
