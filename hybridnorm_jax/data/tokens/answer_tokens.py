"""The tokens of records of which only a part is learned, and which of them are targets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from hybridnorm_jax.data.text.answers import Part
from hybridnorm_jax.data.tokens.tokenizers import PlacedIds, Tokenizer


class MarkedIds(NamedTuple):
    """The ids of a record, for each whether it is a target, and whether the separator behind them is one."""

    ids: Int[np.ndarray, " tokens"]
    is_target: Bool[np.ndarray, " tokens"]
    ends_with_target: bool


def encode_records(tokenizer: Tokenizer, records: Sequence[Sequence[Part]]) -> list[MarkedIds]:
    """The tokens of several records, each in its parts.

    A record with markup is tokenized as one text, as whoever lets a model answer does. A token is a target if it begins
    in a part that is one. Where a content spells out a special token, each part is tokenized alone, so that the
    content keeps it as plain text. A record without markup is always tokenized part by part.

    The separator behind a record is a target if an answer ends there. A separator that ends the record itself is left
    out: one is enough.
    """
    special = tuple(tokenizer.special_tokens)
    as_one = [index for index, parts in enumerate(records) if _is_one_text(parts, special)]
    texts = ["".join(part.text for part in records[index]) for index in as_one]
    placed = dict(zip(as_one, tokenizer.encode_markup(texts), strict=True))
    others = [index for index in range(len(records)) if index not in placed]
    placed |= dict(zip(others, _part_by_part(tokenizer, [records[index] for index in others]), strict=True))
    return [_marked(tokenizer, parts, placed[index]) for index, parts in enumerate(records)]


def _is_one_text(parts: Sequence[Part], special: Sequence[str]) -> bool:
    contents = [part.text for part in parts if not part.is_markup]
    return len(contents) < len(parts) and not any(token in text for text in contents for token in special)


def _part_by_part(tokenizer: Tokenizer, records: Sequence[Sequence[Part]]) -> list[PlacedIds]:
    """The ids of records whose parts are tokenized alone. Of a content's tokens only the part is known."""
    contents = [part.text for parts in records for part in parts if not part.is_markup]
    markup = [part.text for parts in records for part in parts if part.is_markup]
    of_contents, of_markup = iter(tokenizer.encode_batch(contents)), iter(tokenizer.encode_markup(markup))
    found = []
    for parts in records:
        ids, begins, start = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
        for part in parts:
            if part.is_markup:
                part_ids, part_begins = next(of_markup)
            else:
                part_ids = next(of_contents)
                part_begins = np.zeros(len(part_ids), np.int64)
            ids.append(part_ids)
            begins.append(start + part_begins)
            start += len(part.text)
        found.append(PlacedIds(np.concatenate(ids), np.concatenate(begins)))
    return found


def _marked(tokenizer: Tokenizer, parts: Sequence[Part], placed: PlacedIds) -> MarkedIds:
    starts = np.cumsum([0, *(len(part.text) for part in parts)])[:-1]
    # Of several parts that begin at one place all but the last are empty.
    part_of = np.searchsorted(starts, placed.begins, side="right") - 1
    is_target = np.array([part.is_target for part in parts], bool)[part_of]
    special = np.isin(placed.ids, list(tokenizer.special_tokens.values()))
    for number, part in enumerate(parts):
        if part.ends_answer:
            tokens = np.flatnonzero(part_of == number)
            end = next((token for token in tokens if special[token]), None)
            if end is not None and not part.text[: placed.begins[end] - starts[number]].strip():
                is_target[tokens[0] : end + 1] = True
    last = parts[-1]
    ends = last.is_target
    if last.ends_answer:
        ends = last.text.isspace() and not is_target[part_of == len(parts) - 1].any()
    ids = placed.ids
    if len(ids) and ids[-1] == tokenizer.separator_id:
        ids, is_target, ends = ids[:-1], is_target[:-1], bool(is_target[-1])
    return MarkedIds(ids, is_target, ends)
