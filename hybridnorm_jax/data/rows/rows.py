"""What a batch is made of, whatever data.packing says: rows of inputs and targets."""

from typing import Protocol, Self

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.rows.fill_in_the_middle import FillInTheMiddle
from hybridnorm_jax.data.rows.packed_rows import PackedRows, Packing
from hybridnorm_jax.data.rows.windows import Windows
from hybridnorm_jax.data.tokens.token_stream import TokenStream


class Rows(Protocol):
    """A random-access source of rows, each a dict of arrays (seq_len,): see Windows and PackedRows.

    Attributes:
      num_tokens: of all documents, separators included.
      padding: the share of all positions that hold no token.
      tokens_of_rows: how many positions of each row hold a token; None: all of them, in every row. The three special
        tokens of a document that is rearranged (fill_in_the_middle.py) are left out.
      bytes_per_token, words_per_token: of text, per token of the documents; None where unknown.
    """

    num_tokens: int
    padding: float
    tokens_of_rows: Int[np.ndarray, " rows"] | None
    bytes_per_token: float | None
    words_per_token: float | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def drawn(self, index: int, *, seed: int, epoch: int) -> dict[str, np.ndarray]:
        """A row as an epoch of training reads it: where documents are rearranged, each epoch does it anew."""

    def with_stride(self, stride: int | None) -> Self:
        """The same documents in rows that overlap."""

    def beginning(self, count: int) -> Int[np.ndarray, " tokens"]:
        """The first `count` tokens, fewer where there are not so many."""


def make_rows(
    stream: TokenStream,
    data: DataSection,
    *,
    seq_len: int,
    separator_id: int | None,
    training: bool,
    fim: FillInTheMiddle | None = None,
    bytes_per_token: float | None = None,
    words_per_token: float | None = None,
    progress: bool = False,
) -> Rows:
    """The rows that data.packing makes of a stream.

    Args:
      data: of the run; its packing, segment_ids and cache_dir are read.
      separator_id: the id that ends a document.
      training: windows leave out the tokens after the last whole one.
      fim: which documents are rearranged in training; None: none.
      bytes_per_token, words_per_token: of the stream.
      progress: whether a terminal shows how far documents have been packed.
    """
    if data.packing == "windows":
        return Windows(
            stream,
            seq_len=seq_len,
            tail=not training,
            segment_ids=data.segment_ids,
            separator_id=separator_id,
            bytes_per_token=bytes_per_token,
            words_per_token=words_per_token,
        )
    packing = Packing(
        seq_len=seq_len,
        one_in_a_row=data.packing == "padded",
        separator_id=separator_id,
        segment_ids=data.keeps_documents_apart,
        fim=fim,
        cache_dir=data.cache_dir,
        progress=progress,
    )
    return PackedRows(stream, packing, bytes_per_token=bytes_per_token, words_per_token=words_per_token)
