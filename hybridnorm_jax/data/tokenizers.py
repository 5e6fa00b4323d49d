"""Text to token ids and back."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.errors import DataError, MissingExtraError

SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """What this package needs of a tokenizer.

    Attributes:
      name: what data.tokenizer said.
      vocab_size: the largest id plus one.
      separator_id: the id that ends a document, None where the tokenizer has none.
      fingerprint: changes when the ids of a text may change.
    """

    name: str
    vocab_size: int
    separator_id: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids (1-D) of a text, without a separator."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for several texts at once."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; separators, and ids that stand for nothing, are left out."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    separator_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes, as uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids below 256; what is no UTF-8 becomes U+FFFD."""
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")


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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"data.tokenizer={name}: not a tokenizer.json ({error})") from error
        # The file may carry its authors' settings: none of them may cut or pad a document, and a text that spells
        # out the separator must not end a document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name = name
        # get_vocab_size() counts entries, which is too few where ids have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.separator_id = self._find_separator(separator, needs_separator)

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
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)


def load_tokenizer(data: DataSection) -> Tokenizer:
    """The tokenizer that data.tokenizer names.

    Raises:
      DataError: there is none, or it has no document separator and one is needed.
    """
    if data.tokenizer == "bytes":
        if data.separator:
            raise DataError(f"data.separator={data.separator}: data.tokenizer=bytes has a separator of its own")
        return ByteTokenizer()
    path = epath.Path(data.tokenizer).expanduser()
    if path.is_dir():
        raise DataError(f"data.tokenizer={data.tokenizer}: a directory; name the file, {path / 'tokenizer.json'}")
    try:
        content = path.read_bytes()
    except OSError as error:
        right = "give bytes, or the path of a tokenizer.json"
        raise DataError(f"data.tokenizer={data.tokenizer}: {error.strerror or error}; {right}") from error
    # Token files come with their separators in them.
    return HuggingFaceTokenizer(data.tokenizer, content, data.separator, needs_separator=data.source != "tokens")
