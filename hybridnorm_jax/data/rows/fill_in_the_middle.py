"""Documents that are learned with their middle last, so that a model can fill in what is missing (2207.14255).

A document is cut at two places, drawn evenly, into prefix, middle and suffix. Three special tokens say which is which:

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

The cuts are between tokens: nothing is tokenized again. A separator stays at the end.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.errors import DataError

# How much longer a document becomes.
ADDED_TOKENS = 3
# The ids of the tokenizer `bytes` that stand for bytes.
BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """Which documents are rearranged, and how.

    Attributes:
      rate: the share of documents.
      spm_rate: the share of these in the order SPM; the others are in the order PSM.
      prefix_id, suffix_id, middle_id: the three special tokens.
      separator_id: the id that ends a document.
    """

    rate: float
    spm_rate: float
    prefix_id: int
    suffix_id: int
    middle_id: int
    separator_id: int

    def rearranged(
        self, tokens: Int[np.ndarray, " tokens"], *, seed: int, epoch: int, start: int
    ) -> Int[np.ndarray, " rearranged"]:
        """A document as an epoch reads it: as it is, or with its middle last and ADDED_TOKENS longer.

        Args:
          tokens: of the document, with its separator.
          seed: of the order of the data.
          epoch: counted from 0.
          start: where the document stands among all tokens. Seed, epoch and start alone decide.
        """
        draw = np.random.default_rng([seed, epoch, start])
        if draw.random() >= self.rate:
            return tokens
        is_spm = draw.random() < self.spm_rate
        length = len(tokens) - (tokens[-1] == self.separator_id)
        first, second = np.sort(draw.integers(0, length + 1, 2))
        prefix, middle, suffix, end = np.split(tokens, [first, second, length])
        marks = np.array([self.prefix_id, self.suffix_id, self.middle_id], tokens.dtype)
        if is_spm:
            return np.concatenate([marks[:2], suffix, marks[2:], prefix, middle, end])
        return np.concatenate([marks[:1], prefix, marks[1:2], suffix, marks[2:], middle, end])


def fill_in_the_middle(
    data: DataSection, tokenizer: Tokenizer | None, *, separator_id: int, vocab_size: int, seq_len: int
) -> FillInTheMiddle | None:
    """What data.fim_rate asks for; None: nothing.

    Raises:
      DataError: a token that there is not, whose id is outside the vocabulary, or that has another meaning already;
        rows that are too short.
    """
    if not data.fim_rate:
        return None
    if seq_len <= ADDED_TOKENS:
        raise DataError(f"train.seq_len={seq_len}: data.fim_rate needs more than {ADDED_TOKENS}; raise train.seq_len")
    ids = [_id_of(token, tokenizer, vocab_size) for token in data.fim_tokens]
    _check_special(ids, data.fim_tokens, tokenizer, separator_id)
    prefix_id, suffix_id, middle_id = ids
    return FillInTheMiddle(
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        prefix_id=prefix_id,
        suffix_id=suffix_id,
        middle_id=middle_id,
        separator_id=separator_id,
    )


def _check_special(ids: Sequence[int], names: Sequence[str], tokenizer: Tokenizer | None, separator_id: int) -> None:
    """Raise DataError for a token that has another meaning, or two of one id."""
    for place, (found, name) in enumerate(zip(ids, names, strict=True)):
        taken = None
        if found == separator_id:
            taken = "the separator that ends a document"
        elif tokenizer is not None and tokenizer.name == "bytes" and found < BYTES:
            taken = "a byte of the text"
        elif found in ids[:place]:
            taken = f"the token {names[ids.index(found)]} too"
        if taken is not None:
            raise DataError(f"data.fim_tokens: {name}: its id {found} is {taken}; give tokens that stand nowhere else")


def _id_of(token: str, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    what = f"data.fim_tokens: {token}"
    if token.isdecimal():
        found = int(token)
    elif tokenizer is None:
        raise DataError(f"{what}: a name needs data.tokenizer; name its tokenizer.json, or give ids")
    else:
        found = tokenizer.token_id(token)
        if found is None:
            raise DataError(f"{what}: {tokenizer.name} has no such token; name one that it has, or give ids")
    if found >= vocab_size:
        raise DataError(f"{what}: its id {found} is outside model.vocab_size={vocab_size}; raise model.vocab_size")
    return found
