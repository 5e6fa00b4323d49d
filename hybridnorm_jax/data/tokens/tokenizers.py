"""Text to token ids and back."""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from hybridnorm_jax.config.data_section import UNKNOWN_TOKENIZER, DataSection
from hybridnorm_jax.data.files.identity import regular_file_size
from hybridnorm_jax.data.tokens import token_pieces
from hybridnorm_jax.errors import DataError, MissingExtraError
from hybridnorm_jax.file_formats import format_of, pointer_of_git_lfs
from hybridnorm_jax.whole_files import expanded

# The largest known file has 34 MB.
MOST_FILE_BYTES = 256 << 20
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class PlacedIds(NamedTuple):
    """The ids of a text, and at which character of it each token begins."""

    ids: np.ndarray
    begins: np.ndarray


class Tokenizer(Protocol):
    """What this package needs of a tokenizer.

    Attributes:
      name: what data.tokenizer said.
      vocab_size: the largest id plus one.
      separator_id: the id that ends a document, None where the tokenizer has none.
      separator: the token of this id, as a Hugging Face tokenizer spells it.
      special_tokens: the ids of the tokens that a text cannot become, only markup, as they are spelled.
      fingerprint: changes when the ids of a text may change.
    """

    name: str
    vocab_size: int
    separator_id: int | None
    separator: str | None
    special_tokens: Mapping[str, int]
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids (1-D) of a text, without a separator."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for several texts at once."""

    def encode_markup(self, texts: Sequence[str]) -> list[PlacedIds]:
        """Ids of texts in which special tokens may be spelled out, as by a chat template."""

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None: there is none."""

    def long_text(self) -> "LongTokens":
        """Begin a text that is too long to be tokenized at once."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; separators, and ids that stand for nothing, are left out."""


class LongTokens(Protocol):
    """A text that comes in parts, and whose ids are those of the whole text."""

    def feed(self, text: str) -> list[np.ndarray]:
        """Go on with the text; returns the ids, in pieces, that are certain by now."""

    def finish(self) -> list[np.ndarray]:
        """End the text; returns the last ids."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    separator_id = 256
    separator = SEPARATORS[0]
    special_tokens: Mapping[str, int] = {}
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes, as uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_markup(self, texts: Sequence[str]) -> list[PlacedIds]:
        """UTF-8 bytes of each text; a special token is spelled out in bytes, too."""
        lengths = (np.array([len(character.encode()) for character in text], np.int64) for text in texts)
        begins = (np.repeat(np.arange(len(each)), each) for each in lengths)
        return [PlacedIds(self.encode(text), each) for text, each in zip(texts, begins, strict=True)]

    def token_id(self, token: str) -> int | None:
        """None: no byte has a name."""
        return None

    def long_text(self) -> LongTokens:
        """The bytes of every part."""
        return _LongBytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids below 256; what is no UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")


class _LongBytes:
    """Bytes do not depend on their neighbours."""

    def feed(self, text: str) -> list[np.ndarray]:
        """Its bytes."""
        return [np.frombuffer(text.encode(), np.uint8)]

    def finish(self) -> list[np.ndarray]:
        """Nothing is left."""
        return []


class _LongPieces:
    """token_pieces.LongText without separators in its ids."""

    def __init__(self, text: token_pieces.LongText, checked: Any):
        self._text = text
        self._checked = checked

    def feed(self, text: str) -> list[np.ndarray]:
        """The ids that are certain by now."""
        return [self._checked(part, ids) for part, ids in self._text.feed(text)]

    def finish(self) -> list[np.ndarray]:
        """The last ids."""
        part, ids = self._text.finish()
        return [self._checked(part, ids)]


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Its special tokens, when a text spells them out, are plain text."""

    def __init__(self, name: str, content: bytes, separator: str, needs_separator: bool):
        """Make a tokenizer of a file's content.

        Raises:
          DataError: content that is no tokenizer, a separator that it lacks.
        """
        try:
            import tokenizers  # brought by the extra `hf`, which bytes do not need
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"data.tokenizer={name}", extra="hf") from error
        fingerprint = hashlib.sha256(content).hexdigest()
        self.name = name
        self._what = f"data.tokenizer={name}"
        self._tokenizer = self._parse(tokenizers, content)
        self.separator_id = self._find_separator(separator, needs_separator)
        self.separator = None if self.separator_id is None else self._tokenizer.id_to_token(self.separator_id)
        settings = json.loads(content.decode("utf-8-sig"))
        if self._make_plain(settings):
            content = json.dumps(settings).encode()
            self._tokenizer = self._parse(tokenizers, content)
        # The file may carry its authors' settings: none of them may cut or pad a document, and a text that spells
        # out the separator must not end a document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._content = content
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        # get_vocab_size() counts entries, which is too few where ids have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint
        self._obstacle = token_pieces.obstacle(settings)
        self._cuts_before_spaces = token_pieces.cuts_inside_words(settings)

    def _parse(self, tokenizers: Any, content: bytes) -> Any:
        try:
            text = content.decode("utf-8-sig")
            return token_pieces.within_time(
                self._what, token_pieces.SECONDS, lambda: tokenizers.Tokenizer.from_str(text)
            )
        except (UnicodeDecodeError, DataError) as error:
            reason = str(error).removeprefix(f"{self._what}: the library tokenizers failed ").strip("()")
            raise DataError(f"{self._what}: not a tokenizer.json ({reason})") from error

    def _make_plain(self, settings: dict[str, Any]) -> bool:
        """Change what would put the separator, or chance, into the ids of a text; returns whether there was any."""
        changed = False
        for token in settings.get("added_tokens", ()):
            # The library reads a token that is not special in every text, whatever it is told of special ones.
            if token["id"] == self.separator_id and not token["special"]:
                token["special"] = changed = True
        if settings["model"].get("dropout"):
            settings["model"]["dropout"], changed = None, True
        return changed

    def _find_separator(self, separator: str, needed: bool) -> int | None:
        candidates = (separator,) if separator else SEPARATORS
        ids = [self._tokenizer.token_to_id(token) for token in candidates]
        found = next((token for token in ids if token is not None), None)
        if found is None and separator:
            raise DataError(f"data.separator={separator}: {self.name} has no such token; name one that it has")
        if found is None and needed:
            known = ", ".join(SEPARATORS)
            raise DataError(f"data.separator is not set and {self.name} has none of {known}; name one of its tokens")
        return found

    def encode(self, text: str) -> np.ndarray:
        """Ids without beginning- or end-of-text tokens, as int32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text; the library spreads the texts over its threads."""
        texts = list(texts)
        encodings = token_pieces.within_time(
            self._what,
            token_pieces.SECONDS,
            lambda: self._tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        )
        ids = (np.array(encoding.ids, np.int32) for encoding in encodings)
        return [self._without_separator(text, one) for text, one in zip(texts, ids, strict=True)]

    @functools.cached_property
    def _for_markup(self) -> Any:
        """The same tokenizer, but that a special token that is spelled out is one."""
        import tokenizers

        tokenizer = self._parse(tokenizers, self._content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode_markup(self, texts: Sequence[str]) -> list[PlacedIds]:
        """Ids of each text; the library spreads the texts over its threads."""
        texts = list(texts)
        if not texts:
            return []
        encodings = token_pieces.within_time(
            self._what,
            token_pieces.SECONDS,
            lambda: self._for_markup.encode_batch(texts, add_special_tokens=False),
        )
        return [
            PlacedIds(np.array(each.ids, np.int32), np.array([begin for begin, _ in each.offsets], np.int64))
            for each in encodings
        ]

    def token_id(self, token: str) -> int | None:
        """The id of a token, an added one too."""
        return self._tokenizer.token_to_id(token)

    def long_text(self) -> LongTokens:
        """Pieces that end where a word ends; see token_pieces."""
        text = token_pieces.LongText(self.name, self._encoding, self._obstacle, self._cuts_before_spaces)
        return _LongPieces(text, self._without_separator)

    def _encoding(self, text: str) -> Any:
        return token_pieces.within_time(
            self._what, token_pieces.SECONDS, lambda: self._tokenizer.encode(text, add_special_tokens=False)
        )

    def _without_separator(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The ids of a text; where some of it got the separator's id, it is cut there and tokenized in two parts."""
        if self.separator_id is None or not (ids == self.separator_id).any():
            return ids
        encoding = self._encoding(text)
        spelled = [
            place for token, place in zip(encoding.ids, encoding.offsets, strict=True) if token == self.separator_id
        ]
        if any(stop - start < 2 for start, stop in spelled):
            start, stop = next(place for place in spelled if place[1] - place[0] < 2)
            wrong = f"gives the text {text[start:stop]!r} the id {self.separator_id}, which ends a document"
            raise DataError(f"{self._what}: {wrong}; name another token in data.separator, or use another tokenizer")
        cuts = [0, *((start + stop) // 2 for start, stop in spelled), len(text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        return np.concatenate(self.encode_batch(parts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)


def load_tokenizer(data: DataSection, *, needs_separator: bool | None = None) -> Tokenizer:
    """The tokenizer that data.tokenizer names.

    Args:
      needs_separator: whether there must be a token that ends a document; by default for all sources but token files,
        which come with their separators in them.

    Raises:
      DataError: there is none, or it has no document separator and one is needed.
    """
    if data.tokenizer == UNKNOWN_TOKENIZER:
        right = "name the one that the model was trained with, or read token files (data.source=tokens)"
        raise DataError(f"data.tokenizer={data.tokenizer}: {right}")
    if data.tokenizer == "bytes":
        if data.separator:
            raise DataError(f"data.separator={data.separator}: data.tokenizer=bytes has a separator of its own")
        return ByteTokenizer()
    path = epath.Path(expanded(data.tokenizer))
    if path.is_dir():
        raise DataError(f"data.tokenizer={data.tokenizer}: a directory; name the file, {path / 'tokenizer.json'}")
    what = f"data.tokenizer={data.tokenizer}"
    content = read_tokenizer_file(path, what)
    if pointer := pointer_of_git_lfs(path, content):
        raise DataError(f"{what}: {pointer}")
    if found := format_of(content):
        raise DataError(f"{what}: {found.name}, not a tokenizer.json; give bytes, or the path of a tokenizer.json")
    if needs_separator is None:
        needs_separator = data.reads_text
    return HuggingFaceTokenizer(data.tokenizer, content, data.separator, needs_separator=needs_separator)


def read_tokenizer_file(path: epath.Path, what: str) -> bytes:
    """The content of a tokenizer.json; `what` names it in messages."""
    try:
        size = regular_file_size(path)
        if size > MOST_FILE_BYTES:
            raise DataError(f"{path}: {size} bytes, but no tokenizer.json has more than {MOST_FILE_BYTES}")
        return path.read_bytes()
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{what}: {reason}; give bytes, or the path of a tokenizer.json") from error
