"""From the configuration's `data` section to training and validation windows."""

import dataclasses

import numpy as np

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.data.sources import Corpus, find_files, stdlib_corpus, text_corpus
from hybridnorm_jax.data.text_cache import TextCache, open_text_cache
from hybridnorm_jax.data.token_files import BLOCK_TOKENS, open_token_file, split_extents
from hybridnorm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hybridnorm_jax.data.windows import TokenStream, Windows
from hybridnorm_jax.errors import DataError

HELD_OUT = "validation"
# Token files do not know the length of their text: it is measured on up to this many stretches of this many tokens.
SAMPLES, SAMPLE_TOKENS = 16, 16384


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      train: the training windows.
      validation: name -> windows; "validation" is the held-out split, the others are data.validation's sets.
      tokenizer: None where token files are read and data.tokenizer names no file.
      description: one line for people.
    """

    train: Windows
    validation: dict[str, Windows]
    tokenizer: Tokenizer | None
    description: str


@dataclasses.dataclass(frozen=True)
class _Split:
    stream: TokenStream
    bytes_per_token: float | None


def open_data(data: DataSection, *, seq_len: int, vocab_size: int, progress: bool = True) -> Data:
    """Open, and where needed first tokenize, everything that data.* names.

    Raises DataError for what cannot be read, for ids that do not fit `vocab_size` (in token files only once they are
    read), for a training split shorter than one window and for a validation set without a target.
    """
    if data.validation_fraction and HELD_OUT in data.validation:
        right = "the held-out split has that name; choose another, or set data.validation_fraction=0"
        raise DataError(f"data.validation.{HELD_OUT}: {right}")
    if data.source == "tokens":
        if data.segment_ids and data.separator_id is None:
            right = "the id that ends a document must be given"
            raise DataError(f"data.separator_id=null: data.segment_ids=true with data.source=tokens: {right}")
        tokenizer = None if data.tokenizer == "bytes" else load_tokenizer(data)
        separator_id = data.separator_id
        splits, sets, description = _open_token_files(data, tokenizer, vocab_size)
    else:
        tokenizer = load_tokenizer(data)
        separator_id = tokenizer.separator_id
        splits, sets, description = _open_texts(data, tokenizer, vocab_size, progress)
    _check_lengths(data, seq_len, splits, sets)
    if data.validation_fraction:
        sets = {HELD_OUT: splits[1], **sets}

    def windows(split: _Split, tail: bool) -> Windows:
        return Windows(
            split.stream,
            seq_len=seq_len,
            tail=tail,
            separator_id=separator_id if data.segment_ids else None,
            bytes_per_token=split.bytes_per_token,
        )

    validation = {name: windows(split, tail=True) for name, split in sets.items()}
    return Data(windows(splits[0], tail=False), validation, tokenizer, description)


def _open_texts(data: DataSection, tokenizer: Tokenizer, vocab_size: int, progress: bool):
    """((train, held out), named sets, description) of text."""

    def cached(corpus: Corpus, fraction: float) -> TextCache:
        cache = open_text_cache(corpus, tokenizer, fraction=fraction, cache_dir=data.cache_dir, progress=progress)
        if cache.max_id >= vocab_size:
            right = f"set model.vocab_size to at least {tokenizer.vocab_size}"
            wrong = f"its largest id {cache.max_id} does not fit model.vocab_size={vocab_size}"
            raise DataError(f"data.tokenizer={tokenizer.name}: {wrong}; {right}")
        return cache

    def split(cache: TextCache, name: str) -> _Split:
        counts = cache.splits[name]
        return _Split(cache.stream(name, vocab_size), counts.bytes / counts.tokens if counts.tokens else None)

    stdlib = data.source == "stdlib"
    corpus = stdlib_corpus() if stdlib else text_corpus("data.files", data.files, data.text_field)
    cache = cached(corpus, data.validation_fraction)
    sets = {
        name: split(cached(text_corpus(f"data.validation.{name}", files, data.text_field), 1.0), "validation")
        for name, files in data.validation.items()
    }
    train, held_out = cache.splits["train"], cache.splits["validation"]
    description = (
        f"{corpus.name}: {train.documents + held_out.documents:,} documents, {train.tokens:,} tokens "
        f"and {held_out.tokens:,} held out, tokenizer {tokenizer.name}, cached in {cache.directory}"
    )
    return (split(cache, "train"), split(cache, "validation")), sets, description


def _open_token_files(data: DataSection, tokenizer: Tokenizer | None, vocab_size: int):
    """((train, held out), named sets, description) of token files."""

    def split(key: str, files: tuple[str, ...], fraction: float) -> tuple[_Split, _Split]:
        arrays = {path: open_token_file(path, data.token_dtype) for path in find_files(key, files)}
        streams = (TokenStream(extents, vocab_size) for extents in split_extents(arrays, fraction))
        train, held_out = (_Split(stream, _measure_bytes_per_token(stream, tokenizer)) for stream in streams)
        return train, held_out

    train, held_out = split("data.files", data.files, data.validation_fraction)
    sets = {name: split(f"data.validation.{name}", files, 1.0)[1] for name, files in data.validation.items()}
    description = (
        f"token files {', '.join(data.files)}: {len(train.stream):,} tokens and {len(held_out.stream):,} held out, "
        f"tokenizer {tokenizer.name if tokenizer else 'unknown'}"
    )
    return (train, held_out), sets, description


def _measure_bytes_per_token(stream: TokenStream, tokenizer: Tokenizer | None) -> float | None:
    """Bytes of decoded text per token: exact for a short stream, of stretches spread evenly over a long one."""
    if tokenizer is None or not len(stream):
        return None
    if len(stream) <= SAMPLES * SAMPLE_TOKENS:
        stretches = [(0, len(stream))]
    else:
        starts = np.linspace(0, len(stream) - SAMPLE_TOKENS, SAMPLES, dtype=np.int64)
        stretches = [(int(start), int(start) + SAMPLE_TOKENS) for start in starts]
    num_bytes = sum(len(tokenizer.decode(stream.read(*stretch)).encode()) for stretch in stretches)
    return num_bytes / sum(stop - start for start, stop in stretches)


def _check_lengths(data: DataSection, seq_len: int, splits: tuple[_Split, _Split], sets: dict[str, _Split]) -> None:
    """Raise DataError for splits from which no window, or no target, can be made."""
    train, held_out = (len(split.stream) for split in splits)
    # One token has no target.
    if data.validation_fraction and held_out < 2:
        unit = f"block of {BLOCK_TOKENS} tokens" if data.source == "tokens" else "document"
        right = "raise it, give more data, or set it to 0 and name files in data.validation"
        raise DataError(f"data.validation_fraction={data.validation_fraction}: no {unit} was held out; {right}")
    for name, split in sets.items():
        if len(split.stream) < 2:
            raise DataError(f"data.validation.{name}: one token is too few to predict any; give more data")
    if train < seq_len + 1:
        right = "lower train.seq_len, give more data, or lower data.validation_fraction"
        wrong = f"a window needs {seq_len + 1} tokens, but there are {train} to train on"
        raise DataError(f"train.seq_len={seq_len}: {wrong}; {right}")
