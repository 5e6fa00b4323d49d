"""From the configuration's `data` section to training and validation rows."""

import dataclasses

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.distinct_sources import check_contents, check_paths
from hybridnorm_jax.data.files.identity import FileIdentity
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.opened_source import OpenedSource, SourceOpener, Split
from hybridnorm_jax.data.rows.fill_in_the_middle import fill_in_the_middle
from hybridnorm_jax.data.rows.rows import Rows, make_rows
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.errors import DataError

HELD_OUT = "validation"


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of what is trained on.

    Attributes:
      train: its training rows.
      description: one line for people.
      files: the identity of every file, in the order they are read.
      is_split_by_hash: whether it is the hash of a document, or of a block, alone that holds it out. Of few documents
        the hash may choose none, or all; then one of them, or a part of one, is on the other side, and which one that
        is depends on all the others.
      documents: how many the training rows are made of; None: unknown.
    """

    train: Rows
    description: str = ""
    files: tuple[FileIdentity, ...] = ()
    is_split_by_hash: bool = True
    documents: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      sources: name -> source of data.mixture; without a mixture "" -> the only one.
      validation: name -> rows. Without a mixture "validation" is the held-out split; with one, each source's
        held-out split has the name of the source. The others are data.validation's sets.
      tokenizer: None where token files are read and data.tokenizer names no file.
      made_by: the fingerprint of the tokenizer that made all ids, which tokenized directories say too; None: unknown.
    """

    sources: dict[str, Source]
    validation: dict[str, Rows]
    tokenizer: Tokenizer | None
    made_by: str | None = None

    @property
    def train_tokens(self) -> int:
        """Tokens of all sources that are trained on."""
        return sum(source.train.num_tokens for source in self.sources.values())

    @property
    def train(self) -> Rows:
        """The training rows of the only source; a mixture has several (`sources`), and is asked for none."""
        (only,) = self.sources.values()
        return only.train

    @property
    def description(self) -> str:
        """One line for people."""
        if len(self.sources) == 1:
            return self.first.description
        tokenizer = self.tokenizer.name if self.tokenizer else "unknown"
        return f"mixture of {len(self.sources)} sources, {self.train_tokens:,} tokens, tokenizer {tokenizer}"

    @property
    def first(self) -> Source:
        """The only source, or the first one of a mixture."""
        return next(iter(self.sources.values()))


def source_key(name: str) -> str:
    """The key that names the files of a source."""
    return f"data.mixture.{name}.files" if name else "data.files"


def open_data(data: DataSection, *, seq_len: int, vocab_size: int, progress: bool = True) -> Data:
    """Open, and where needed first tokenize, everything that data.* names.

    Raises:
      DataError: something cannot be read; ids do not fit `vocab_size` (in token files this shows only once they are
        read); the training split is shorter than one window; a validation set has no target; two sources have a file
        in common.
    """
    if data.validation_fraction and not data.mixture and HELD_OUT in data.validation:
        right = "the held-out split has that name; choose another, or set data.validation_fraction=0"
        raise DataError(f"data.validation.{HELD_OUT}: {right}")
    opener = SourceOpener(data, vocab_size=vocab_size, progress=progress)
    # A slip in a name is said before anything is tokenized.
    for name, patterns in data.validation.items():
        find_files(f"data.validation.{name}", patterns)
    check_paths({name: section for name, section in data.sources.items() if name})
    opened = {name: _opened(opener, name, section) for name, section in data.sources.items()}
    check_contents({name: source.files for name, source in opened.items()})
    sets = {
        name: opener.validation_set(patterns, key=f"data.validation.{name}")
        for name, patterns in data.validation.items()
    }
    _check_streams(data, seq_len, opened, sets)

    separator_id = next(iter(opened.values())).train.separator_id
    fim = fill_in_the_middle(data, opener.tokenizer, separator_id=separator_id, vocab_size=vocab_size, seq_len=seq_len)

    def rows(split: Split, key: str, *, training: bool = False) -> Rows:
        made = make_rows(
            split.stream,
            data,
            seq_len=seq_len,
            separator_id=split.separator_id,
            training=training,
            fim=fim if training else None,
            bytes_per_token=split.bytes_per_token,
            words_per_token=split.words_per_token,
            progress=progress,
        )
        if not len(made):
            right = "data.packing=windows, in which a target may be of the document after its input"
            raise DataError(f"{key}: no document has two tokens, so none has a target; {right}")
        return made

    def source(name: str, found: OpenedSource) -> Source:
        train = rows(found.train, source_key(name), training=True)
        packed = "" if data.packing == "windows" else f", in {len(train):,} rows with {train.padding:.3%} padding"
        description = found.description + packed
        return Source(train, description, found.files, found.is_split_by_hash, found.documents)

    sources = {name: source(name, found) for name, found in opened.items()}
    validation = {name: rows(split, f"data.validation.{name}") for name, split in sets.items()}
    if data.validation_fraction:
        key = f"data.validation_fraction={data.validation_fraction}"
        held_out = {
            name or HELD_OUT: rows(found.held_out, f"data.mixture.{name}: {key}" if name else key)
            for name, found in opened.items()
        }
        validation = held_out | validation
    return Data(sources=sources, validation=validation, tokenizer=opener.tokenizer, made_by=opener.made_by)


def _opened(opener: SourceOpener, name: str, section: DataSection) -> OpenedSource:
    """One source; of a mixture every refusal says which."""
    try:
        return opener.source(section, key=source_key(name))
    except DataError as error:
        where = f"data.mixture.{name}"
        if not name or str(error).startswith(where):
            raise
        raise DataError(f"{where}: {error}") from error.__cause__


def _check_streams(data: DataSection, seq_len: int, opened: dict[str, OpenedSource], sets: dict[str, Split]) -> None:
    """Raise DataError for splits from which no window, or no target, can be made, or not as data.fim_rate asks."""
    # One token has no target.
    for name, source in opened.items():
        where = f"data.mixture.{name}: " if name else ""
        if data.validation_fraction and len(source.held_out.stream) < 2:
            right = "raise it, give more data, or set it to 0 and name files in data.validation"
            wrong = "fewer than two tokens were held out"
            raise DataError(f"{where}data.validation_fraction={data.validation_fraction}: {wrong}; {right}")
    for name, split in sets.items():
        if len(split.stream) < 2:
            raise DataError(f"data.validation.{name}: one token is too few to predict any; give more data")
    for name, source in opened.items():
        where = f"data.mixture.{name}: " if name else ""
        if data.fim_rate and source.train.stream.has_targets:
            right = "not with token files of which only a part is learned; leave it out"
            raise DataError(f"{where}data.fim_rate={data.fim_rate}: {right}")
        train = len(source.train.stream)
        if data.packing == "windows" and train < seq_len + 1:
            fraction = ", or lower data.validation_fraction" if data.validation_fraction else ""
            right = f"lower train.seq_len, or give more data{fraction}"
            wrong = f"a window needs {seq_len + 1} tokens, but there are {train} to train on"
            raise DataError(f"{where}train.seq_len={seq_len}: {wrong}; {right}")
