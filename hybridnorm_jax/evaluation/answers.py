"""Texts that a model is asked to write, until a stop string or a number of tokens: options, batches, and the answers.

Who writes is given by the caller, since generation/ is no part of this package.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.evaluation.text_requests import before_first

Tokens = Int[np.ndarray, " tokens"]
# The harness's own default, for tasks that do not say how long an answer may be.
MAX_NEW_TOKENS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KEYS = ("until", "do_sample", *LENGTHS, *SAMPLING)


class Question(NamedTuple):
    """A text to go on from, and the options of a task, such as {"until": ["\\n"], "max_gen_toks": 32}."""

    context: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """How an answer is written.

    Attributes:
      stops: it ends before the first of these strings.
      max_new_tokens: it has at most so many tokens.
      sampling: names and values of the rules by which tokens are chosen; none: always the likeliest token.
    """

    stops: tuple[str, ...]
    max_new_tokens: int
    sampling: tuple[tuple[str, float], ...] = ()


class Write(Protocol):
    """What writes."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Mapping[str, float],
        seeds: Sequence[int],
        on_tokens: Callable[[list[Tokens]], bool],
    ) -> list[Tokens]:
        """The new tokens after each prompt; `on_tokens` is given the newest ones, and ends it by returning True."""


def read_options(keys: Mapping[str, Any]) -> Options:
    """The options of a task, in the harness's words.

    Raises:
      UserError: a word that is not known, or a value that cannot be.
    """
    for name in keys:
        if name not in KEYS:
            raise UserError(f"generation_kwargs: {name}: not known{did_you_mean(name, KEYS)}")
    until = keys.get("until") or ()
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"generation_kwargs: until={until!r:.80}: must be a text, or a list of texts")
    lengths = {name: keys[name] for name in LENGTHS if keys.get(name) is not None}
    name, given = next(iter(lengths.items()), (LENGTHS[0], MAX_NEW_TOKENS))
    try:
        length = int(given)
    except (TypeError, ValueError):
        length = 0
    if length < 1:
        raise UserError(f"generation_kwargs: {name}={given!r:.80}: must be an integer of at least 1")
    rules = {name: keys[name] for name in SAMPLING if keys.get(name) is not None}
    temperature = rules.pop("temperature", 0)
    if keys.get("do_sample", temperature > 0):
        rules["temperature"] = temperature
    else:
        rules = {name: value for name, value in rules.items() if name == "repetition_penalty"}
    return Options(tuple(stops), length, tuple(sorted(rules.items())))


def check_length(options: Options, window: int) -> None:
    """Raise UserError unless an answer, and one token before it, fit the tokens that the model reads."""
    if options.max_new_tokens >= window:
        right = "shorten it in the task's generation_kwargs, or lengthen train.seq_len"
        raise UserError(
            f"max_gen_toks={options.max_new_tokens}: must be below the {window} tokens that the model reads; {right}"
        )


class Writer:
    """Answers questions, those with the same options together, in batches of similar length."""

    def __init__(self, write: Write, tokenizer: Tokenizer, *, separator: int | None, window: int, batch_size: int):
        """Nothing is compiled yet.

        Args:
          write: what writes.
          tokenizer: of the model.
          separator: what an empty context is; None: nothing.
          window: of a context so much is read that it and the answer fit into so many tokens.
          batch_size: answers that are written at a time.
        """
        self._write, self._tokenizer, self._separator = write, tokenizer, separator
        self._window, self._batch_size = window, batch_size

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The answer to each question, in their order.

        Raises:
          UserError: options that are not known; an answer that is longer than the window; an empty context where there
            is no separator.
        """
        prompts = self._tokenizer.encode_batch([question.context for question in questions])
        by_options: dict[Options, list[int]] = {}
        for number, question in enumerate(questions):
            by_options.setdefault(read_options(question.options), []).append(number)
        answers = [""] * len(questions)
        for options, numbers in by_options.items():
            check_length(options, self._window)
            numbers.sort(key=lambda number: len(prompts[number]), reverse=True)
            # All batches of these options have as many rows, so that one more length is one more program at most.
            rows = min(self._batch_size, 1 << (len(numbers) - 1).bit_length())
            for first in range(0, len(numbers), rows):
                batch = numbers[first : first + rows]
                asked = [self._prompt(prompts[number], options) for number in batch]
                texts = self._texts(asked, options, seeds=batch, rows=rows)
                for number, text in zip(batch, texts, strict=False):
                    answers[number] = text
        return answers

    def _prompt(self, tokens: np.ndarray, options: Options) -> list[int]:
        kept = tokens[-(self._window - options.max_new_tokens) :].tolist()
        if not kept and self._separator is None:
            raise UserError("an empty context: the tokenizer has no separator to begin with; name data.separator")
        return kept or [self._separator]

    def _texts(self, prompts: list[list[int]], options: Options, *, seeds: list[int], rows: int) -> list[str]:
        """One text for each prompt; the batch is filled up with its last prompt."""
        missing = rows - len(prompts)
        written: list[list[int]] = [[] for _ in range(rows)]

        def on_tokens(new: list[Tokens]) -> bool:
            for row, tokens in zip(written, new, strict=True):
                row.extend(int(token) for token in tokens)
            return all(self._has_ended(row, options) for row in written[: len(prompts)])

        tokens = self._write(
            prompts + prompts[-1:] * missing,
            max_new_tokens=options.max_new_tokens,
            sampling=dict(options.sampling),
            seeds=seeds + seeds[-1:] * missing,
            on_tokens=on_tokens,
        )
        texts = [self._tokenizer.decode(row) for row in tokens[: len(prompts)]]
        return [before_first(text, options.stops) for text in texts]

    def _has_ended(self, tokens: list[int], options: Options) -> bool:
        if self._separator is not None and self._separator in tokens:
            return True
        text = self._tokenizer.decode(tokens)
        return before_first(text, options.stops) != text
