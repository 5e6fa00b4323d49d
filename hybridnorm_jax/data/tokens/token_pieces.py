"""Long texts as tokens, a piece at a time, with the ids that the whole text would get.

Tokenizing takes more than 100 bytes of memory for each byte of text, so a long text is tokenized in windows. A window
may end where one of its words ends. It does so only if both of these hold:

- The tokenizer finds words from left to right, and what it makes of a text after the end of a word depends on nothing
  before it. `obstacle` says of a tokenizer.json whether that is so.
- Tokenizing what follows on its own gives the same ids as tokenizing it with everything before it. This is tried at
  every cut, over the stretch that the window goes beyond the cut. Two readings of a text that agree once, in a place
  where a word ends, agree for ever.
"""

import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from hybridnorm_jax.errors import DataError

Result = TypeVar("Result")

# Characters of a window, and how far it goes beyond the cut; the end of it is not compared, it lacks what follows.
WINDOW = 1 << 18
BEYOND = 1 << 12
NOT_COMPARED = 1 << 10
CUTS_TRIED = 50
# Bytes of text that are tokenized at once where no cut is allowed, or none is found.
LONGEST_AT_ONCE = 4 << 20
SECONDS = 120

# Each maps a character, or few neighbouring ones, without a look at the others.
LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled", "ByteLevel",
    "Replace", "Prepend", "Strip", "Sequence",
}  # fmt: skip
LEFT_TO_RIGHT = {
    "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "CharDelimiterSplit", "Metaspace",
    "ByteLevel", "Split", "Sequence",
}  # fmt: skip
MODELS = {"BPE", "Unigram", "WordPiece", "WordLevel"}
# What a regular expression must not look at: what stands before it, or far behind it.
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_NEAR_LOOKAHEAD = re.compile(r"\(\?[!=]\\[sS]\)")
_LOOKS_ELSEWHERE = re.compile(r"\(\?<|\(\?[=!]|\\[bBAGzZK1-9]|\^|\$")


def obstacle(settings: Mapping[str, Any]) -> str | None:
    """Why texts must not be cut for the tokenizer of this tokenizer.json; None where they may."""
    for part, known in (("normalizer", LOCAL_NORMALIZERS), ("pre_tokenizer", LEFT_TO_RIGHT)):
        for component in _components(settings.get(part)):
            if component["type"] not in known:
                return f"{part} {component['type']}"
            pattern = component.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
            if regex is not None and _looks_elsewhere(regex):
                return f"{part} with the regular expression {json.dumps(regex)}"
    kind = settings.get("model", {}).get("type")
    return None if kind in MODELS else f"model {kind}"


def _components(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if component is None:
        return []
    inner = [*component.get("normalizers", ()), *component.get("pretokenizers", ())]
    return [component, *(part for one in inner for part in _components(one))]


def _looks_elsewhere(regex: str) -> bool:
    return _LOOKS_ELSEWHERE.search(_NEAR_LOOKAHEAD.sub("", _CHARACTER_CLASS.sub("x", regex))) is not None


def cuts_inside_words(settings: Mapping[str, Any]) -> bool:
    """Whether a text that no pre-tokenizer splits into words may be cut before a space all the same.

    So it is for byte-pair encoding where no token holds a space (a lower one-eighth block, U+2581) behind another
    character: no merge then reaches over the place before a space, and both sides are merged as if alone.
    """
    model = settings.get("model", {})
    if model.get("type") != "BPE":
        return False
    added = {token["content"] for token in settings.get("added_tokens", ())}
    words = (token for token in model.get("vocab", {}) if token not in added)
    return not any(re.search(r"[^\u2581 ][\u2581 ]", token) for token in words)


class LongText:
    """One text that comes in parts: `feed` and `finish` return the ids that are certain by then."""

    def __init__(self, name: str, encode: Callable[[str], Any], obstacle: str | None, before_spaces: bool):
        """Begin a text.

        Args:
          name: of the tokenizer, for messages.
          encode: text -> Encoding of the library `tokenizers`.
          obstacle: why the text must not be cut, if it must not.
          before_spaces: the answer of cuts_inside_words.
        """
        self._name = name
        self._encode = encode
        self._obstacle = obstacle
        self._before_spaces = before_spaces
        self._text = ""
        self._window = WINDOW

    def feed(self, text: str) -> list[tuple[str, np.ndarray]]:
        """Go on with the text; returns (text, ids) of the parts that are done."""
        self._text += text
        done = []
        while len(self._text) >= self._window + BEYOND:
            part = None if self._obstacle else self._cut()
            if part is None:
                self._window *= 2
                self._check_length()
            else:
                done.append(part)
                self._window = WINDOW
        return done

    def finish(self) -> tuple[str, np.ndarray]:
        """End the text; returns the last part."""
        return self._text, np.array(self._encode(self._text).ids, np.int32)

    def _check_length(self) -> None:
        length = len(self._text.encode())
        if length <= LONGEST_AT_ONCE:
            return
        reason = f"its {self._obstacle} may look at all of a text" if self._obstacle else "no place to cut it is found"
        right = "give shorter documents, such as one record a line (.jsonl)"
        wrong = f"a text of more than {LONGEST_AT_ONCE >> 20} MiB cannot be tokenized in pieces: {reason}"
        raise DataError(f"data.tokenizer={self._name}: {wrong}; {right}")

    def _cut(self) -> tuple[str, np.ndarray] | None:
        """Take the first part of the text, if there is a place to cut it."""
        window = self._text[: self._window + BEYOND]
        encoding = self._encode(window)
        ids, ends, words = encoding.ids, encoding.offsets, encoding.word_ids
        tried = 0
        last = len(window) - BEYOND // 2
        for index in range(len(ids) - 1, 0, -1):
            cut = ends[index - 1][1]
            if cut > last or not self._is_word_end(window, cut, words[index - 1], words[index]):
                continue
            if cut < len(window) // 2 or tried == CUTS_TRIED:
                break
            tried += 1
            compared = [place for place in range(index, len(ids)) if ends[place][1] <= len(window) - NOT_COMPARED]
            expected = [(ids[place], ends[place][1]) for place in compared]
            # Some tokenizers put a space before every text: there the text's own space is left out.
            for rest in (cut, cut + 1) if window[cut] == " " else (cut,):
                if len(expected) > 1 and self._read_alone(window, rest)[: len(expected)] == expected:
                    self._text = self._text[rest:]
                    return window[:rest], np.array(ids[:index], np.int32)
        return None

    def _read_alone(self, window: str, rest: int) -> list[tuple[int, int]]:
        """(id, its end in the window) of what stands from `rest` on, tokenized without what stands before.

        The ends matter: inside a long run of spaces, ids agree of readings that are one space apart.
        """
        encoding = self._encode(window[rest:])
        return [(one, rest + end) for one, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _is_word_end(self, window: str, cut: int, word: int | None, following: int | None) -> bool:
        if not 0 < cut < len(window) or not window[cut - 1].isalnum() or window[cut].isalnum():
            return False
        if word != following:
            return True
        return self._before_spaces and window[cut] == " " and window[cut - 1].isascii()


def within_time(what: str, seconds: float, function: Callable[[], Result]) -> Result:
    """The result of a function that may never end; the thread in which it then still runs ends with the process.

    Raises:
      DataError: it took longer, or it failed in the library `tokenizers`.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # a panic of Rust is no Exception
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if failures:
        error = failures[0]
        if isinstance(error, DataError):
            raise error
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{what}: the library tokenizers failed ({reason})") from error
    right = "one of its regular expressions may never end; use another tokenizer"
    raise DataError(f"{what}: a piece of text was not tokenized within {seconds} s; {right}")
