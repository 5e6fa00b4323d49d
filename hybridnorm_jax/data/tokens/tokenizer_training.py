"""A vocabulary of byte pairs (BPE) learned from text, by the library `tokenizers`."""

from collections.abc import Iterator

from hybridnorm_jax.data.text.document_reader import SplitRule
from hybridnorm_jax.data.text.sources import Corpus
from hybridnorm_jax.errors import DataError, MissingExtraError

# All bytes, and the separator.
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 4_000_000


def train_tokenizer(
    corpus: Corpus, *, vocab_size: int, separator: str, fraction: float, asked: str, shown: bool
) -> str:
    """A tokenizer.json: byte-level byte-pair encoding, whose words are those of GPT-2's regular expression.

    Every text can be written with it, because the 256 bytes are tokens. Id 0 is the separator. What the hash of a
    document holds out takes no part. The same text gives the same file.

    Args:
      corpus: the text.
      vocab_size: tokens in all; fewer where the text has not as many pairs.
      separator: the token that ends a document.
      fraction: the share of documents that is left out.
      asked: what needs the library, for the message.
      shown: whether the library shows a bar.

    Raises:
      DataError: text that cannot be read, or none that is not held out.
      MissingExtraError: the library is not there.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ModuleNotFoundError as error:
        raise MissingExtraError(asked, extra="hf") from error
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=shown,
    )
    texts = _Texts(corpus, SplitRule(fraction))
    tokenizer.train_from_iterator(iter(texts), trainer)
    if not texts.count:
        right = "set data.validation_fraction=0, or give more text"
        raise DataError(f"data.validation_fraction={fraction}: nothing of {corpus.name} is left to learn from; {right}")
    return tokenizer.to_str()


class _Texts:
    """What is not held out. `count`: how many documents, or blocks of them, were read."""

    def __init__(self, corpus: Corpus, rule: SplitRule):
        self._corpus, self._rule = corpus, rule
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        whole = self._corpus.holds_whole_files_out(self._rule.fraction)
        for file in self._corpus.files:
            for document in self._corpus.documents(file, whole=whole):
                if not self._rule.holds_out(document.digest):
                    self.count += 1
                    yield document.text
