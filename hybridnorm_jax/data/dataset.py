"""From the configuration's `data` section to training and validation windows."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.data.identity import FileIdentity, identities, relative_names
from hybridnorm_jax.data.sources import Corpus, find_files, pattern_root, stdlib_corpus, text_corpus
from hybridnorm_jax.data.text_cache import TextCache, open_text_cache
from hybridnorm_jax.data.token_files import OpenFiles, TokenFile, is_split_by_hash, open_token_file, split_extents
from hybridnorm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hybridnorm_jax.data.windows import Extent, TokenStream, Windows
from hybridnorm_jax.errors import DataError

HELD_OUT = "validation"
# Token files do not know the length of their text: it is measured on up to this many stretches of this many tokens.
SAMPLES = 16
SAMPLE_TOKENS = 16384
# Of so many stretches of this many tokens the ids are looked at before anything is compiled.
CHECKED_TOKENS = 1024
# More paths than these are counted, not listed.
SHOWN_FILES = 5


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      train: the training windows.
      validation: name -> windows; "validation" is the held-out split, the others are data.validation's sets.
      tokenizer: None where token files are read and data.tokenizer names no file.
      description: one line for people.
      files: the identity of every file of data.files, or of the standard library, in the order they are read.
      is_split_by_hash: whether it is the hash of a document, or of a block, alone that holds it out. Of few documents
        the hash may choose none, or all; then one of them, or a part of one, is on the other side, and which one that
        is depends on all the others.
    """

    train: Windows
    validation: dict[str, Windows]
    tokenizer: Tokenizer | None
    description: str
    files: tuple[FileIdentity, ...] = ()
    is_split_by_hash: bool = True


@dataclasses.dataclass(frozen=True)
class _Split:
    """Tokens of one purpose, and how many bytes and words of text each stands for; None where that is unknown."""

    stream: TokenStream
    bytes_per_token: float | None
    words_per_token: float | None


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Everything that data.* names, before it is cut into windows.

    Attributes:
      train, held_out: the two parts of data.files, or of the standard library.
      sets: the sets of data.validation, by name.
      tokenizer, description, files, is_split_by_hash: as in Data.
      separator_id: the id that ends a document, if there is one.
    """

    train: _Split
    held_out: _Split
    sets: dict[str, _Split]
    tokenizer: Tokenizer | None
    separator_id: int | None
    description: str
    files: tuple[FileIdentity, ...]
    is_split_by_hash: bool


def open_data(data: DataSection, *, seq_len: int, vocab_size: int, progress: bool = True) -> Data:
    """Open, and where needed first tokenize, everything that data.* names.

    Raises:
      DataError: something cannot be read; ids do not fit `vocab_size` (in token files this shows only once they are
        read); the training split is shorter than one window; a validation set has no target.
    """
    if data.validation_fraction and HELD_OUT in data.validation:
        right = "the held-out split has that name; choose another, or set data.validation_fraction=0"
        raise DataError(f"data.validation.{HELD_OUT}: {right}")
    opened = _open_token_files(data, vocab_size) if data.source == "tokens" else _open_texts(data, vocab_size, progress)
    _check_lengths(data, seq_len, opened)

    def windows(split: _Split, *, tail: bool) -> Windows:
        return Windows(
            split.stream,
            seq_len=seq_len,
            tail=tail,
            separator_id=opened.separator_id if data.segment_ids else None,
            bytes_per_token=split.bytes_per_token,
            words_per_token=split.words_per_token,
        )

    held_out = {HELD_OUT: opened.held_out} if data.validation_fraction else {}
    return Data(
        train=windows(opened.train, tail=False),
        validation={name: windows(split, tail=True) for name, split in (held_out | opened.sets).items()},
        tokenizer=opened.tokenizer,
        description=opened.description,
        files=opened.files,
        is_split_by_hash=opened.is_split_by_hash,
    )


def _open_texts(data: DataSection, vocab_size: int, progress: bool) -> _Opened:
    tokenizer = load_tokenizer(data)

    def tokenized(corpus: Corpus, fraction: float) -> TextCache:
        cache = open_text_cache(corpus, tokenizer, fraction=fraction, cache_dir=data.cache_dir, progress=progress)
        if cache.max_id >= vocab_size:
            right = f"set model.vocab_size to at least {tokenizer.vocab_size}"
            wrong = f"its largest id {cache.max_id} does not fit model.vocab_size={vocab_size}"
            raise DataError(f"data.tokenizer={tokenizer.name}: {wrong}; {right}")
        return cache

    def split(cache: TextCache, name: str) -> _Split:
        counts = cache.splits[name]
        stream = cache.stream(name, vocab_size)
        if not counts.tokens:
            return _Split(stream, None, None)
        return _Split(stream, counts.bytes / counts.tokens, counts.words / counts.tokens)

    corpus = stdlib_corpus() if data.source == "stdlib" else text_corpus("data.files", data.files, data.text_field)
    others = {
        name: text_corpus(f"data.validation.{name}", files, data.text_field) for name, files in data.validation.items()
    }
    cache = tokenized(corpus, data.validation_fraction)
    sets = {name: split(tokenized(other, fraction=1.0), "validation") for name, other in others.items()}
    train, held_out = cache.splits["train"], cache.splits["validation"]
    share = _share(held_out.tokens, train.tokens, data.validation_fraction)
    description = (
        f"{corpus.name}: {_documents(cache.documents, train.pieces + held_out.pieces)}, {train.tokens:,} tokens "
        f"and {held_out.tokens:,} held out{share}, tokenizer {tokenizer.name}, cached in {cache.directory}"
    )
    return _Opened(
        train=split(cache, "train"),
        held_out=split(cache, "validation"),
        sets=sets,
        tokenizer=tokenizer,
        separator_id=tokenizer.separator_id,
        description=description,
        files=corpus.identities,
        is_split_by_hash=cache.is_split_by_hash,
    )


def _open_token_files(data: DataSection, vocab_size: int) -> _Opened:
    if data.segment_ids and data.separator_id is None:
        right = "the id that ends a document must be given"
        raise DataError(f"data.separator_id=null: data.segment_ids=true with data.source=tokens: {right}")
    if data.separator_id is not None and not 0 <= data.separator_id < vocab_size:
        right = f"must be an id of the vocabulary, from 0 to model.vocab_size-1={vocab_size - 1}"
        raise DataError(f"data.separator_id={data.separator_id}: {right}")
    tokenizer = load_tokenizer(data) if data.has_tokenizer_file else None
    paths = find_files("data.files", data.files)
    root = pattern_root(data.files)
    others = {name: find_files(f"data.validation.{name}", files) for name, files in data.validation.items()}
    descriptors = OpenFiles()

    def opened(paths: tuple[epath.Path, ...]) -> dict[epath.Path, TokenFile]:
        return {path: open_token_file(path, data.token_dtype, descriptors) for path in paths}

    def split(parts: tuple[Extent, ...]) -> _Split:
        stream = TokenStream(parts, vocab_size)
        _check_sample(stream)
        separator = data.separator_id
        if separator is None and tokenizer is not None:
            separator = tokenizer.separator_id
        return _Split(stream, *_measure_text_per_token(stream, tokenizer, separator))

    files = identities(paths, root)
    if data.validation_fraction:
        _check_no_copies(files)
    arrays, names = opened(paths), relative_names(paths, root)
    own = split_extents(arrays, names, data.validation_fraction)
    sets = {
        name: split(split_extents(opened(other), relative_names(other), fraction=1.0).held_out)
        for name, other in others.items()
    }
    train, held_out = split(own.train), split(own.held_out)
    named = ", ".join(data.files) if len(data.files) <= SHOWN_FILES else f"{len(data.files)} paths"
    share = _share(len(held_out.stream), len(train.stream), data.validation_fraction)
    description = (
        f"token files {named}: {len(train.stream):,} tokens and {len(held_out.stream):,} held out{share}, "
        f"tokenizer {tokenizer.name if tokenizer else 'unknown'}"
    )
    return _Opened(
        train=train,
        held_out=held_out,
        sets=sets,
        tokenizer=tokenizer,
        separator_id=data.separator_id,
        description=description,
        files=files,
        is_split_by_hash=is_split_by_hash(arrays, names, data.validation_fraction),
    )


def _check_no_copies(files: Sequence[FileIdentity]) -> None:
    """Refuse a token file that is there twice: what one of the two holds out, the other would be trained on."""
    by_content: dict[tuple[int, str], str] = {}
    for file in files:
        before = by_content.setdefault((file.size, file.digest), file.name)
        if before != file.name:
            wrong = f"{file.name} has the content of {before}, so parts of it would be held out and trained on"
            right = "leave one out, or set data.validation_fraction=0 and name files in data.validation"
            raise DataError(f"data.files: {wrong}; {right}")


def _check_sample(stream: TokenStream) -> None:
    """Raise DataError where ids of some stretches are outside the vocabulary; others show once they are read."""
    for start in np.linspace(0, max(len(stream) - CHECKED_TOKENS, 0), SAMPLES, dtype=np.int64).tolist():
        if len(stream):
            stream.read(start, min(start + CHECKED_TOKENS, len(stream)))


def _documents(count: int, pieces: int) -> str:
    """How many documents there are, and how many pieces where some are held out in parts."""
    number = "1 document" if count == 1 else f"{count:,} documents"
    return number if pieces == count else f"{number} in {pieces:,} pieces"


def _share(held_out: int, train: int, asked: float) -> str:
    """The held-out share for people, and that it is far from what was asked for, as with a few large documents."""
    if not held_out:
        return ""
    share = held_out / (held_out + train)
    far = "" if asked / 2 <= share <= asked * 2 else f" where data.validation_fraction asks for {asked:.2%}"
    return f" ({share:.2%}{far})"


def _measure_text_per_token(
    stream: TokenStream, tokenizer: Tokenizer | None, separator: int | None
) -> tuple[float | None, float | None]:
    """(bytes, words) of decoded text per token: exact for a short stream, of stretches spread over a long one."""
    if tokenizer is None or not len(stream):
        return None, None
    starts, length = [0], len(stream)
    if len(stream) > SAMPLES * SAMPLE_TOKENS:
        length = SAMPLE_TOKENS
        starts = np.linspace(0, len(stream) - length, SAMPLES, dtype=np.int64).tolist()
    num_bytes = num_words = 0
    for start in starts:
        ids = stream.read(start, start + length)
        # The last word of a document and the first of the next are two, and nothing may stand between them.
        ends = [] if separator is None else np.flatnonzero(ids == separator) + 1
        for document in np.split(ids, ends):
            text = tokenizer.decode(document)
            num_bytes += len(text.encode())
            num_words += len(text.split())
    return num_bytes / (len(starts) * length), num_words / (len(starts) * length)


def _check_lengths(data: DataSection, seq_len: int, opened: _Opened) -> None:
    """Raise DataError for splits from which no window, or no target, can be made."""
    # One token has no target.
    if data.validation_fraction and len(opened.held_out.stream) < 2:
        right = "raise it, give more data, or set it to 0 and name files in data.validation"
        wrong = "fewer than two tokens were held out"
        raise DataError(f"data.validation_fraction={data.validation_fraction}: {wrong}; {right}")
    for name, split in opened.sets.items():
        if len(split.stream) < 2:
            raise DataError(f"data.validation.{name}: one token is too few to predict any; give more data")
    train = len(opened.train.stream)
    if train < seq_len + 1:
        fraction = ", or lower data.validation_fraction" if data.validation_fraction else ""
        right = f"lower train.seq_len, or give more data{fraction}"
        wrong = f"a window needs {seq_len + 1} tokens, but there are {train} to train on"
        raise DataError(f"train.seq_len={seq_len}: {wrong}; {right}")
