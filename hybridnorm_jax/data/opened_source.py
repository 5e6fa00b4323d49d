"""One source of data, opened: its tokens to train on and to hold out, and what is known of its files.

A source is what `source`, `files` and the other keys of one data section say. A run reads one, or several in a mixture;
dataset.py puts them together. A validation set of data.validation is opened here too.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.data.files.companions import with_companions
from hybridnorm_jax.data.files.identity import FileIdentity, identities, relative_names
from hybridnorm_jax.data.files.patterns import find_files, listed, pattern_root
from hybridnorm_jax.data.places.local_copies import copies_of
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.document_reader import SPLITS
from hybridnorm_jax.data.text.sources import Corpus, patterns_corpus, section_corpus
from hybridnorm_jax.data.tokens import tokenized_source
from hybridnorm_jax.data.tokens.id_records import KnownIds, id_corpus, is_of_records
from hybridnorm_jax.data.tokens.text_cache import open_text_cache
from hybridnorm_jax.data.tokens.token_files import (
    OpenFiles,
    TokenFile,
    is_split_by_hash,
    open_token_file,
    split_extents,
)
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.data.tokens.token_workers import ReadyIds, id_dtype
from hybridnorm_jax.data.tokens.tokenized_directory import TokenizedDirectory
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from hybridnorm_jax.errors import DataError

# Token files do not know the length of their text: it is measured on up to this many stretches of this many tokens.
SAMPLES = 16
SAMPLE_TOKENS = 16384
# Of so many stretches of this many tokens the ids are looked at before anything is compiled.
CHECKED_TOKENS = 1024
# More paths than these are counted, not listed.
SHOWN_FILES = 5


@dataclasses.dataclass(frozen=True)
class Split:
    """Tokens of one purpose, and how many bytes and words of text each stands for; None where that is unknown.

    Attributes:
      separator_id: the id that ends a document, if there is one.
    """

    stream: TokenStream
    separator_id: int | None
    bytes_per_token: float | None
    words_per_token: float | None


@dataclasses.dataclass(frozen=True)
class OpenedSource:
    """One source, before it is cut into windows.

    Attributes:
      train, held_out: its two parts; the second is empty where nothing is held out.
      documents: how many the training part holds, or parts of them; None: token files do not say.
      description: one line for people.
      files: the identity of every file, in the order they are read.
      is_split_by_hash: as in dataset.Source.
    """

    train: Split
    held_out: Split
    documents: int | None
    description: str
    files: tuple[FileIdentity, ...]
    is_split_by_hash: bool


class SourceOpener:
    """Opens the sources and the validation sets of one run, which share a tokenizer and the list of open files.

    Attributes:
      tokenizer: None where all sources are token files and data.tokenizer names no file.
    """

    def __init__(self, data: DataSection, *, vocab_size: int, progress: bool):
        """Load the tokenizer.

        Raises:
          DataError: it cannot be read; data.separator_id is missing or no id.
        """
        self._data = data
        self._vocab_size = vocab_size
        self._progress = progress
        self._descriptors = OpenFiles()
        self._copies = copies_of(data, progress=progress)
        self._directory: TokenizedDirectory | None = None  # the first one, of whatever source
        if data.reads_tokens:
            _check_is_id(data.separator_id, vocab_size)
        needed = data.reads_text or data.has_tokenizer_file
        self.tokenizer: Tokenizer | None = load_tokenizer(data) if needed else None
        _check_one_separator(data, self.tokenizer)

    def source(self, section: DataSection, *, key: str) -> OpenedSource:
        """The source that a data section names, where needed tokenized first.

        Args:
          section: its source, files and what else decides which tokens are read.
          key: names its files in messages.

        Raises:
          DataError: something cannot be read; ids do not fit the vocabulary (in token files this shows only once they
            are read).
        """
        return self._token_source(section, key) if section.source == "tokens" else self._text_source(section, key)

    def validation_set(self, patterns: Sequence[str], *, key: str) -> Split:
        """All tokens of the files of a validation set."""
        section = self._data
        if section.kind_of_set(patterns) == "tokens":
            directories = tokenized_source.directories_of(key, patterns, self._copies)
            if directories:
                separator_id = self._separator_of(directories, section, key)
                return self._directories_split(directories, tokenized_source.BOTH, separator_id)
            paths = find_files(key, patterns)
            if is_of_records(paths, key):
                return self._tokens(self._id_records(section, patterns, key, fraction=1.0).extents(["validation"]))
            arrays = self._opened(self._fetched(paths, patterns, key), section)
            _check_separator_id(section, key, arrays.values())
            return self._tokens(split_extents(arrays, relative_names(paths), 1.0).held_out)
        corpus = patterns_corpus(section, patterns, key)
        return self._text_split(self._cached(corpus, fraction=1.0), "validation")

    def _text_source(self, section: DataSection, key: str) -> OpenedSource:
        corpus = section_corpus(section, key)
        cache = self._cached(corpus, section.validation_fraction)
        found = cache.manifest
        if section.filter and not found.documents:
            raise DataError(f"data.filter={spelled(section.filter)}: no record of {key} meets it")
        train, held_out = found.splits["train"], found.splits["validation"]
        share = _share(held_out.tokens, train.tokens, section.validation_fraction)
        description = (
            f"{corpus.name}: {_documents(found.documents, train.pieces + held_out.pieces)}, {train.tokens:,} tokens "
            f"and {held_out.tokens:,} held out{share}, tokenizer {self._known_tokenizer.name}, "
            f"cached in {cache.path}"
        )
        return OpenedSource(
            train=self._text_split(cache, "train"),
            held_out=self._text_split(cache, "validation"),
            documents=train.pieces,
            description=description,
            files=corpus.identities,
            is_split_by_hash=found.is_split_by_hash,
        )

    @property
    def made_by(self) -> str | None:
        """The fingerprint of the tokenizer that made the ids of all that was opened; None: nothing says which."""
        if self.tokenizer is not None:
            return self.tokenizer.fingerprint
        return None if self._directory is None else self._directory.manifest.tokenizer.fingerprint

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise AssertionError("text is read with a tokenizer")
        return self.tokenizer

    def _cached(self, corpus: Corpus, fraction: float) -> TokenizedDirectory:
        tokenizer = self._known_tokenizer
        cache = open_text_cache(
            corpus, tokenizer, fraction=fraction, cache_dir=self._data.cache_dir, progress=self._progress
        )
        if cache.manifest.max_id >= self._vocab_size:
            right = f"set model.vocab_size to at least {tokenizer.vocab_size}"
            wrong = f"its largest id {cache.manifest.max_id} does not fit model.vocab_size={self._vocab_size}"
            raise DataError(f"data.tokenizer={tokenizer.name}: {wrong}; {right}")
        return cache

    def _text_split(self, cache: TokenizedDirectory, name: str) -> Split:
        counts = cache.manifest.splits[name]
        stream = cache.stream([name], self._vocab_size)
        separator_id = self._known_tokenizer.separator_id
        # Of what is learned only a part is text, and of that nobody has counted the bytes.
        if not counts.tokens or stream.has_targets:
            return Split(stream, separator_id, None, None)
        return Split(stream, separator_id, counts.bytes / counts.tokens, counts.words / counts.tokens)

    def _token_source(self, section: DataSection, key: str) -> OpenedSource:
        directories = tokenized_source.directories_of(key, section.files, self._copies)
        if directories:
            return self._directories_source(directories, section, key)
        paths = find_files(key, section.files)
        root = pattern_root(section.files)
        if is_of_records(paths, key):
            return self._id_records_source(section, key)
        paths = self._fetched(paths, section.files, key)
        # In this order: a file that is changed after it was opened is refused when it is read.
        arrays, names = self._opened(paths, section), relative_names(paths, root)
        files = identities(paths, root)
        fraction = section.validation_fraction
        if fraction:
            _check_no_copies(files, key)
        _check_separator_id(self._data, key, arrays.values())
        own = split_extents(arrays, names, fraction)
        train, held_out = self._tokens(own.train), self._tokens(own.held_out)
        named = ", ".join(section.files) if len(section.files) <= SHOWN_FILES else f"{len(section.files)} paths"
        share = _share(len(held_out.stream), len(train.stream), fraction)
        description = (
            f"token files {named}: {len(train.stream):,} tokens and {len(held_out.stream):,} held out{share}, "
            f"tokenizer {self.tokenizer.name if self.tokenizer else 'unknown'}"
        )
        return OpenedSource(
            train=train,
            held_out=held_out,
            documents=None,
            description=description,
            files=files,
            is_split_by_hash=is_split_by_hash(arrays, names, fraction),
        )

    def _id_records(
        self, section: DataSection, patterns: Sequence[str], key: str, *, fraction: float
    ) -> TokenizedDirectory:
        corpus = id_corpus(section, patterns, key, vocab_size=self._vocab_size)
        ids = KnownIds(section.separator_id, vocab_size=self._vocab_size)
        return open_text_cache(
            corpus,
            ids,
            fraction=fraction,
            cache_dir=self._data.cache_dir,
            progress=self._progress,
            workers=ReadyIds(id_dtype(ids)),
        )

    def _id_records_source(self, section: DataSection, key: str) -> OpenedSource:
        cache = self._id_records(section, section.files, key, fraction=section.validation_fraction)
        train, held_out = (self._tokens(cache.extents([split], self._descriptors)) for split in SPLITS)
        share = _share(len(held_out.stream), len(train.stream), section.validation_fraction)
        description = (
            f"records of token ids: {cache.manifest.documents:,} documents, {len(train.stream):,} tokens and "
            f"{len(held_out.stream):,} held out{share}, tokenizer "
            f"{self.tokenizer.name if self.tokenizer else 'unknown'}, cached in {cache.path}"
        )
        return OpenedSource(
            train=train,
            held_out=held_out,
            documents=cache.manifest.splits["train"].pieces,
            description=description,
            files=identities(find_files(key, section.files), pattern_root(section.files)),
            is_split_by_hash=cache.manifest.is_split_by_hash,
        )

    def _directories_source(
        self, directories: Sequence[TokenizedDirectory], section: DataSection, key: str
    ) -> OpenedSource:
        separator_id = self._separator_of(directories, section, key)
        own, held = tokenized_source.splits_of(directories, section.validation_fraction)
        train, held_out = (self._directories_split(directories, names, separator_id) for names in (own, held))
        shards = [shard for directory in directories for shard in directory.shards()]
        files = identities(shards, pattern_root(section.files))
        if held:
            _check_no_copies(files, key)
        share = _share(len(held_out.stream), len(train.stream), section.validation_fraction)
        documents = sum(directory.manifest.documents for directory in directories)
        names = ", ".join(str(directory.path) for directory in directories[:SHOWN_FILES])
        return OpenedSource(
            train=train,
            held_out=held_out,
            documents=sum(directory.manifest.splits[name].pieces for directory in directories for name in own),
            description=(
                f"tokenized text {names}: {documents:,} documents, {len(train.stream):,} tokens and "
                f"{len(held_out.stream):,} held out{share}, tokenizer {directories[0].manifest.tokenizer.name}"
            ),
            files=files,
            is_split_by_hash=all(directory.manifest.is_split_by_hash for directory in directories),
        )

    def _separator_of(self, directories: Sequence[TokenizedDirectory], section: DataSection, key: str) -> int:
        """The id that ends the documents of directories, which belong to all others of the run."""
        self._directory = self._directory or directories[0]
        made_by = self._directory.manifest.tokenizer.fingerprint
        if self.tokenizer is None and self._data.tokenizer == made_by == ByteTokenizer.fingerprint:
            self.tokenizer = ByteTokenizer()
        return tokenized_source.check_belongs(
            (self._directory, *directories),
            self.tokenizer,
            key=key,
            separator_id=section.separator_id,
            vocab_size=self._vocab_size,
        )

    def _directories_split(
        self, directories: Sequence[TokenizedDirectory], splits: Sequence[str], separator_id: int
    ) -> Split:
        part = tokenized_source.part(directories, splits, vocab_size=self._vocab_size, files=self._descriptors)
        count = len(part.stream)
        if not count or part.stream.has_targets:
            return Split(part.stream, separator_id, None, None)
        return Split(part.stream, separator_id, part.bytes / count, part.words / count)

    def _fetched(self, paths: tuple[Place, ...], patterns: Sequence[str], key: str) -> tuple[Place, ...]:
        """Token files with what lies beside them, on this machine."""
        return self._copies.fetched(with_companions(paths, listed(key, patterns)))

    def _opened(self, paths: tuple[Place, ...], section: DataSection) -> dict[Place, TokenFile]:
        return {path: open_token_file(path, section.token_dtype, self._descriptors) for path in paths}

    def _tokens(self, parts: tuple[Extent, ...]) -> Split:
        stream = TokenStream(parts, self._vocab_size)
        _check_sample(stream)
        separator = self._data.separator_id
        if separator is None and self.tokenizer is not None:
            separator = self.tokenizer.separator_id
        return Split(stream, self._data.separator_id, *_measure_text_per_token(stream, self.tokenizer, separator))


def _check_separator_id(data: DataSection, key: str, arrays: Iterable[TokenFile]) -> None:
    """Raise DataError where documents matter and nothing says where they end."""
    matter = data.segment_ids or data.packing != "windows"
    if matter and data.separator_id is None and any(array.ends is None for array in arrays):
        asks = "data.segment_ids=true" if data.segment_ids else f"data.packing={data.packing}"
        right = "the id that ends a document must be given, or an index beside every file"
        raise DataError(f"data.separator_id=null: {asks} with token files ({key}): {right}")


def _check_is_id(separator_id: int | None, vocab_size: int) -> None:
    if separator_id is not None and not 0 <= separator_id < vocab_size:
        right = f"must be an id of the vocabulary, from 0 to model.vocab_size-1={vocab_size - 1}"
        raise DataError(f"data.separator_id={separator_id}: {right}")


def _check_one_separator(data: DataSection, tokenizer: Tokenizer | None) -> None:
    """Refuse a mixture of text and token files whose documents end with different ids."""
    if tokenizer is None or not (data.reads_text and data.reads_tokens) or data.separator_id is None:
        return
    if data.separator_id != tokenizer.separator_id:
        wrong = f"the documents of the mixture's text end with id {tokenizer.separator_id} of {tokenizer.name}"
        raise DataError(f"data.separator_id={data.separator_id}: {wrong}; token files must end theirs with the same id")


def _check_no_copies(files: Sequence[FileIdentity], key: str) -> None:
    """Refuse a token file that is there twice: what one of the two holds out, the other would be trained on."""
    by_content: dict[tuple[int, str], str] = {}
    for file in files:
        before = by_content.setdefault((file.size, file.digest), file.name)
        if before != file.name:
            wrong = f"{file.name} has the content of {before}, so parts of it would be held out and trained on"
            right = "leave one out, or set data.validation_fraction=0 and name files in data.validation"
            raise DataError(f"{key}: {wrong}; {right}")


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
    # Of what is learned only a part is text.
    if tokenizer is None or not len(stream) or stream.has_targets:
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
