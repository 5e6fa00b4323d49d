"""Records that hold token ids instead of text: a list of integers in the field data.text_field of each record.

They come in all formats of records (record_formats.py), such as the tf.train.Examples in a TFRecord or ArrayRecord
file. Such a file gives no random access to its tokens, so it is copied once into the cache of tokenized text; every
record is a document.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from hybridnorm_jax.config.data_file_names import RECORD_SUFFIXES, TABLE_SUFFIXES, TAR_SUFFIXES
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.record_filter import field_value, parse_conditions
from hybridnorm_jax.data.places.local_copies import copies_of
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.archives import plain_name
from hybridnorm_jax.data.text.examples import record_format
from hybridnorm_jax.data.text.record_formats import rows_of
from hybridnorm_jax.data.text.record_rows import RecordRow, has_field, shown_names
from hybridnorm_jax.data.text.sources import Corpus, Document, TextFile, text_corpus
from hybridnorm_jax.errors import DataError


def is_of_records(paths: Sequence[Place], key: str) -> bool:
    """Whether these files of token ids are files of records, by their names.

    Raises:
      DataError: some are, and others are not.
    """
    of_records = [_is_of_records(path) for path in paths]
    if any(of_records) and not all(of_records):
        wrong = f"{paths[of_records.index(True)]} holds records, and {paths[of_records.index(False)]} does not"
        raise DataError(f"{key}: {wrong}; name files of one kind")
    return any(of_records)


def _is_of_records(path: Place) -> bool:
    name = plain_name(path.name)
    return name.endswith((*RECORD_SUFFIXES, *TABLE_SUFFIXES, *TAR_SUFFIXES)) or record_format(name) is not None


class KnownIds:
    """What stands in the place of a tokenizer where ids come ready; attributes as of Tokenizer."""

    name = "ids"
    separator = None
    fingerprint = "ids of records"

    def __init__(self, separator_id: int | None, *, vocab_size: int):
        self.separator_id, self.vocab_size = separator_id, vocab_size


@dataclasses.dataclass(frozen=True)
class IdCorpus(Corpus):
    """Files of records of ids; the `text` of its documents is a 1-D array.

    Attributes:
      separator_id: the id that ends a document; a record may have it at its end.
      vocab_size: of the model.
    """

    separator_id: int | None = None
    vocab_size: int = 0

    def holds_whole_files_out(self, fraction: float) -> bool:
        """A record is held out whole."""
        return True

    def _documents(self, file: TextFile, whole: bool) -> Iterator[Document]:
        """The records of one of the files that have ids.

        Raises:
          DataError: a record has no list of ids of the vocabulary; a file has none.
        """
        found = False
        rows = rows_of(file.path, self.text_field, [condition.field for condition in self.conditions])
        for row in rows or ():
            found = True
            if all(condition.holds(row.fields, row.place) for condition in self.conditions):
                ids = self._ids(row)
                if len(ids):
                    digest = hashlib.sha256(ids.astype("<i8").tobytes()).digest()
                    yield Document(ids, num_bytes=0, digest=digest)
        if not found:
            raise DataError(f"{file.path}: holds no records; remove it from data.files or data.validation")

    def _ids(self, row: RecordRow) -> np.ndarray:
        """The ids of a record, without the separator that may end them."""
        field = f"field {self.text_field!r} (data.text_field)"
        value = field_value(row.fields, self.text_field)
        if value is None and not has_field(row.fields, self.text_field):
            raise DataError(f"{row.place}: the record has no {field}; it has: {shown_names(row.fields)}")
        values = value if isinstance(value, list) else [value]
        if not all(type(one) is int for one in values):
            right = "for text set data.source=text"
            raise DataError(f"{row.place}: {field} must hold a list of token ids, which are integers; {right}")
        wrong = next((one for one in values if not 0 <= one < self.vocab_size), None)
        if wrong is not None:
            right = "set model.vocab_size to the tokenizer's"
            raise DataError(f"{row.place}: {wrong} is outside model.vocab_size={self.vocab_size}; {right}")
        if values and values[-1] == self.separator_id:
            values = values[:-1]
        return np.array(values, np.int64)


def id_corpus(section: DataSection, patterns: Sequence[str], key: str, *, vocab_size: int) -> IdCorpus:
    """The records that paths and patterns name, read as a section says."""
    corpus = text_corpus(key, patterns, section.text_field, parse_conditions(section.filter), copies=copies_of(section))
    return IdCorpus(
        name=corpus.name.replace("text", "record"),
        files=corpus.files,
        text_field=corpus.text_field,
        root=corpus.root,
        conditions=corpus.conditions,
        copies=corpus.copies,
        separator_id=section.separator_id,
        vocab_size=vocab_size,
    )
