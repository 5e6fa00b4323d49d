"""The sample of text that training prints at its end: which prompt it goes on from, and how both are shown."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.config.run_config import LARGEST_SEED, RunConfig
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.data import Data, Rows, Tokenizer
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.generation.generate import generate
from hybridnorm_jax.generation.prompts import NO_TOKEN, Documents
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.model.config import ModelConfig

# Below 1, so that unlikely tokens are rarer than the model says; well above 0, at which small models repeat themselves.
TEMPERATURE = 0.8

# A first line may be as short as `"""`, which says little, or as long as a whole document.
FEWEST_CHARACTERS, MOST_TOKENS = 12, 64


class Prompt(NamedTuple):
    """What a sample goes on from.

    Attributes:
      ids: at least one token. The prompt begins a document: behind the separator, if the model has learned it so.
      text: what is shown of it.
      source: what it is, for people.
    """

    ids: Int[np.ndarray, "prompt"]
    text: str
    source: str


def check_prompt(config: RunConfig, data: Data) -> None:
    """Refuse a train.sample_prompt from which no sample can be made, before anything is trained.

    Raises:
      ConfigError: there is no tokenizer, the prompt has no token, or one that the model does not know.
    """
    text = config.train.sample_prompt
    if text is None:
        return
    if data.tokenizer is None:
        right = "data.tokenizer names no tokenizer for these token files; name its tokenizer.json"
        raise ConfigError(f"train.sample_prompt={spelled(text)}: {right}")
    ids = _own_prompt(text, data.tokenizer, config.data.follows_separator).ids
    if not len(ids):
        raise ConfigError(f"train.sample_prompt={spelled(text)}: {NO_TOKEN[config.data.follows_separator]}")
    if ids.max() >= config.model.vocab_size:
        right = f"does not fit model.vocab_size={config.model.vocab_size}; data.tokenizer is not that of these tokens"
        raise ConfigError(f"train.sample_prompt={spelled(text)}: its token {ids.max()} {right}")


def text_sample(config: RunConfig, data: Data, params: Any) -> str:
    """A prompt and its continuation by the model, each below a line that says what it is."""
    if data.tokenizer is None:
        return "No sample of text: data.tokenizer names no tokenizer for these token files."
    count, window = config.train.sample_tokens, config.train.seq_len
    # No text grows beyond a length at which its first tokens would be rotated anew.
    window = min(window, config.model.length_of_short_factors or window)
    prompt = _prompt(config.train.sample_prompt, data, window, config.data.follows_separator)
    ids = go_on(config.model, params, prompt.ids, count=count, window=window, seed=config.train.seed)
    cut = f"; the model reads its last {window:,} tokens" if len(prompt.ids) > window else ""
    tokens = "1 token" if count == 1 else f"{count:,} tokens"
    return (
        f"Sample of text\n--- prompt: {prompt.source}{cut}\n{printable(prompt.text)}\n"
        f"--- the model goes on: {tokens} at temperature {TEMPERATURE}\n{printable(decoded(ids, data.tokenizer))}\n---"
    )


def go_on(
    config: ModelConfig, params: Any, prompt: Int[np.ndarray, " prompt"], *, count: int, window: int, seed: int
) -> Int[np.ndarray, " count"]:
    """`count` tokens after a prompt, drawn at TEMPERATURE.

    The model never reads more than `window` tokens, the length that it was trained on: where they are full, it goes on
    from the last half of them.
    """
    known = np.asarray(prompt)[-window:]
    stretches: list[np.ndarray] = []
    left = count
    while left > 0:
        if len(known) > window:
            known = known[-((window + 1) // 2) :]
        (new,) = generate(
            config,
            params,
            [known],
            # The last of them is written, but not read.
            max_new_tokens=min(left, window - len(known) + 1),
            sampling=Sampling(temperature=TEMPERATURE),
            seeds=[(seed + len(stretches)) % (LARGEST_SEED + 1)],
        )
        known, left = np.concatenate([known, new]), left - len(new)
        stretches.append(new)
    return np.concatenate(stretches)


def decoded(ids: Int[np.ndarray, "tokens"], tokenizer: Tokenizer) -> str:
    """The text of tokens, with a line of its own where a document ends."""
    ends = [] if tokenizer.separator_id is None else np.flatnonzero(ids == tokenizer.separator_id)
    return "\n[end of document]\n".join(tokenizer.decode(part) for part in _split_after(ids, ends))


def printable(text: str) -> str:
    """Harmless text without line breaks around it."""
    return harmless(text).strip("\n")


def harmless(text: str) -> str:
    """Text that moves no cursor and changes no color: other control characters than newline and tab are U+FFFD."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)


def _split_after(ids: Int[np.ndarray, "tokens"], ends: Any) -> list[Int[np.ndarray, "part"]]:
    return np.split(ids, np.asarray(ends, int) + 1) if len(ends) else [ids]


def _prompt(own: str | None, data: Data, window: int, follows_separator: bool) -> Prompt:
    if own is not None:
        return _own_prompt(own, data.tokenizer, follows_separator)
    if data.validation:
        name, windows = next(iter(data.validation.items()))
        source = f"the beginning of the held-out set {name}"
        return _first_line(windows, data.tokenizer, window, follows_separator, source)
    source = "the beginning of the training data, since nothing is held out"
    return _first_line(data.first.train, data.tokenizer, window, follows_separator, source)


def _own_prompt(text: str, tokenizer: Tokenizer, follows_separator: bool) -> Prompt:
    source = "train.sample_prompt" if text else "none, a document begins"
    ids = Documents(tokenizer, follows_separator=follows_separator).begun(tokenizer.encode(text))
    return Prompt(ids, text, source)


def _first_line(windows: Rows, tokenizer: Tokenizer, window: int, follows_separator: bool, source: str) -> Prompt:
    """The first line of a set's first document, as far as it and the separator fit the window."""
    ids = windows.beginning(min(MOST_TOKENS, max(window - 1, 1)))
    ends = np.flatnonzero(ids == tokenizer.separator_id) if tokenizer.separator_id is not None else []
    # A set of token files may begin with the end of a document.
    after = next((end for end in ends if tokenizer.decode(ids[:end]).strip()), None)
    ids = ids[:after]
    length = next((length for length in range(1, len(ids)) if _is_line(tokenizer.decode(ids[:length]))), len(ids))
    begun = Documents(tokenizer, follows_separator=follows_separator).begun(ids[:length])
    return Prompt(begun, tokenizer.decode(ids[:length]), source)


def _is_line(text: str) -> bool:
    return text.endswith("\n") and len(text.strip()) >= FEWEST_CHARACTERS
