"""From the configuration's `data` section to training and validation rows."""

import dataclasses

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.fill_in_the_middle import fill_in_the_middle
from hybridnorm_jax.data.identity import FileIdentity
from hybridnorm_jax.data.opened_source import OpenedSource, SourceOpener, Split
from hybridnorm_jax.data.places.patterns import find_files
from hybridnorm_jax.data.rows import Rows, make_rows
from hybridnorm_jax.data.tokenizers import Tokenizer
from hybridnorm_jax.errors import DataError

HELD_OUT = "validation"


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      train: the training rows.
      validation: name -> rows; "validation" is the held-out split, the others are data.validation's sets.
      tokenizer: None where token files are read and data.tokenizer names no file.
      description: one line for people.
      files: the identity of every file of data.files, or of the standard library, in the order they are read.
      is_split_by_hash: whether it is the hash of a document, or of a block, alone that holds it out. Of few documents
        the hash may choose none, or all; then one of them, or a part of one, is on the other side, and which one that
        is depends on all the others.
    """

    train: Rows
    validation: dict[str, Rows]
    tokenizer: Tokenizer | None
    description: str
    files: tuple[FileIdentity, ...] = ()
    is_split_by_hash: bool = True


def open_data(data: DataSection, *, seq_len: int, vocab_size: int, progress: bool = True) -> Data:
    """Open, and where needed first tokenize, everything that data.* names.

    Raises:
      DataError: something cannot be read; ids do not fit `vocab_size` (in token files this shows only once they are
        read); the training split is shorter than one window; a validation set has no target.
    """
    if data.validation_fraction and HELD_OUT in data.validation:
        right = "the held-out split has that name; choose another, or set data.validation_fraction=0"
        raise DataError(f"data.validation.{HELD_OUT}: {right}")
    opener = SourceOpener(data, vocab_size=vocab_size, progress=progress)
    for name, patterns in data.validation.items():
        find_files(f"data.validation.{name}", patterns)  # a slip in a name is said before anything is tokenized
    own = opener.source(data, key="data.files")
    sets = {
        name: opener.validation_set(data, patterns, key=f"data.validation.{name}")
        for name, patterns in data.validation.items()
    }
    _check_lengths(data, seq_len, own, sets)

    fim = fill_in_the_middle(
        data, opener.tokenizer, separator_id=own.separator_id, vocab_size=vocab_size, seq_len=seq_len
    )

    def rows(split: Split, key: str, *, training: bool = False) -> Rows:
        made = make_rows(
            split.stream,
            data,
            seq_len=seq_len,
            separator_id=own.separator_id,
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

    train = rows(own.train, "data.files", training=True)
    validation = {name: rows(split, f"data.validation.{name}") for name, split in sets.items()}
    if data.validation_fraction:
        held_out = rows(own.held_out, f"data.validation_fraction={data.validation_fraction}")
        validation = {HELD_OUT: held_out, **validation}
    packed = "" if data.packing == "windows" else f", in {len(train):,} rows with {train.padding:.3%} padding"
    return Data(
        train=train,
        validation=validation,
        tokenizer=opener.tokenizer,
        description=own.description + packed,
        files=own.files,
        is_split_by_hash=own.is_split_by_hash,
    )


def _check_lengths(data: DataSection, seq_len: int, own: OpenedSource, sets: dict[str, Split]) -> None:
    """Raise DataError for splits from which no window, or no target, can be made."""
    # One token has no target.
    if data.validation_fraction and len(own.held_out.stream) < 2:
        right = "raise it, give more data, or set it to 0 and name files in data.validation"
        wrong = "fewer than two tokens were held out"
        raise DataError(f"data.validation_fraction={data.validation_fraction}: {wrong}; {right}")
    for name, split in sets.items():
        if len(split.stream) < 2:
            raise DataError(f"data.validation.{name}: one token is too few to predict any; give more data")
    train = len(own.train.stream)
    if data.packing == "windows" and train < seq_len + 1:
        fraction = ", or lower data.validation_fraction" if data.validation_fraction else ""
        right = f"lower train.seq_len, or give more data{fraction}"
        wrong = f"a window needs {seq_len + 1} tokens, but there are {train} to train on"
        raise DataError(f"train.seq_len={seq_len}: {wrong}; {right}")
