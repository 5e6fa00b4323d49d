"""Text on disk as a stream of documents, and the identity whose hash decides which of them are held out.

A document is a whole text file, or one record of a file of records (record_formats.py). Its identity is

- for the standard library, the path relative to the library: the same file has the same fate in every Python;
- for any other text, the text itself: moving, renaming or reordering files changes nothing, and two copies of a text
  never fall on both sides of the split.

Where few files are given, and wherever a file is long, what is held out are blocks of a file's lines, by their text.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator

from etils import epath

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.record_filter import Condition, parse_conditions
from hybridnorm_jax.data.files.identity import FileIdentity, identities
from hybridnorm_jax.data.files.patterns import find_files, pattern_root
from hybridnorm_jax.data.places.local_copies import AHEAD, LocalCopies, copies_of
from hybridnorm_jax.data.places.remote_file import Place, RemoteFile
from hybridnorm_jax.data.text.answers import AnswerRecords, Part
from hybridnorm_jax.data.text.archives import chunks
from hybridnorm_jax.data.text.chat_templates import answer_records
from hybridnorm_jax.data.text.record_formats import rows_of
from hybridnorm_jax.data.text.record_rows import record_text
from hybridnorm_jax.data.text.text_files import decoded, text_blocks
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import BOM

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Of fewer files that would be held out, blocks of all files are.
FEWEST_WHOLE = 10


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a block of one; its length in UTF-8 bytes, and the SHA-256 of its identity.

    Attributes:
      continues: whether it is the next block of the same text as the document before it.
      parts: of a record of which only a part is learned; together they are its text.
    """

    text: str
    num_bytes: int
    digest: bytes
    continues: bool = False
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file and, where it is the path that identifies its document, that path (None: the text does)."""

    path: Place
    identity: str | None = None


def holds_whole_files_out(count: int, fraction: float) -> bool:
    """Whether so many text files are enough to hold whole ones out; otherwise blocks of all files are."""
    return fraction in (0, 1) or fraction * count >= FEWEST_WHOLE


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text files in the order they are read.

    Attributes:
      name: for people.
      files: in their order.
      text_field: of records.
      root: the directory to which the files' names are relative.
      conditions: which a record must meet to be read.
      answers: how records are read of which only a part is learned; None: all of their text is.
      copies: where remote files are fetched to, one after the other; None: all files are on this machine.
    """

    name: str
    files: tuple[TextFile, ...]
    text_field: str = "text"
    root: str | None = None
    conditions: tuple[Condition, ...] = ()
    answers: AnswerRecords | None = None
    copies: LocalCopies | None = None

    def signature(self) -> list:
        """[name, size in bytes, digest of sampled content, time of last change] of every file, and the filter.

        The time is no part of a file's identity. It only makes sure that text is tokenized again after a change that
        the samples do not show.
        """
        found = self.identities
        paths = [file.path for file in self.files]
        files = [[*dataclasses.astuple(one), _changed(path)] for one, path in zip(found, paths, strict=True)]
        # Nothing without a filter, so that text that was tokenized before there were any is found again.
        others = [["filter", condition.text] for condition in self.conditions]
        if self.answers is not None:
            others.append(["records", self.answers.fingerprint])
        return files + others

    @functools.cached_property
    def identities(self) -> tuple[FileIdentity, ...]:
        """The identity of every file, read once."""
        return identities([file.path for file in self.files], self.root)

    def holds_whole_files_out(self, fraction: float) -> bool:
        """Whether there are enough text files to hold whole ones out."""
        return holds_whole_files_out(len(self.files), fraction)

    def documents(self, file: TextFile, *, whole: bool = True) -> Iterator[Document]:
        """The documents of one of the files.

        Args:
          file: one of `files`.
          whole: whether a text file of up to WHOLE_BYTES is one document; a longer one always comes in blocks.

        Raises:
          DataError: it cannot be read or holds no text.
        """
        with self._readable(file.path) as path:
            yield from self._documents(dataclasses.replace(file, path=path), whole)

    def _readable(self, path: Place) -> contextlib.AbstractContextManager[Place]:
        """The file on this machine, while the context lasts; the next ones are on their way to it."""
        if self.copies is None or not isinstance(path, RemoteFile):
            return contextlib.nullcontext(path)
        following = self._numbers[path.url] + 1
        return self.copies.held(path, [file.path for file in self.files[following : following + AHEAD]])

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {os.fspath(file.path): number for number, file in enumerate(self.files)}

    def _documents(self, file: TextFile, whole: bool) -> Iterator[Document]:
        found = False
        if self.answers is not None:
            yield from self._records(file)
            return
        for text, data, continues in self._texts(file, whole):
            if text is None:
                found = True
                continue
            if not continues and (not text or text.isspace()):
                continue
            continues, found = continues and found, True
            digest = hashlib.sha256(data if file.identity is None else file.identity.encode()).digest()
            document = Document(text, len(data), digest, continues)
            del text, data  # a document may be long: it is there once, and not beside the next one
            yield document
            del document
        # The standard library has empty __init__.py files; anybody else's empty file is a mistake.
        if not found and file.identity is None:
            raise DataError(f"{file.path}: holds no text; remove it from data.files or data.validation")

    def _records(self, file: TextFile) -> Iterator[Document]:
        """The records of one of the files, of which only a part is learned."""
        fields = [*self.answers.fields, *(condition.field for condition in self.conditions)]
        rows = rows_of(file.path, fields[0], fields[1:])
        if rows is None:
            right = "name files of records, such as .jsonl"
            raise DataError(f"{file.path}: a text file has no field {fields[0]!r} (data.records); {right}")
        count = 0
        for row in rows:
            count += 1
            if all(condition.holds(row.fields, row.place) for condition in self.conditions):
                parts = self.answers.parts(row.fields, row.place)
                text = "".join(part.text for part in parts)
                data = _encode(text, row.place)
                yield Document(text, len(data), hashlib.sha256(data).digest(), parts=tuple(parts))
        if not count:
            raise DataError(f"{file.path}: holds no record; remove it from data.files or data.validation")

    def _texts(self, file: TextFile, whole: bool) -> Iterator[tuple[str | None, bytes, bool]]:
        """(text, its UTF-8, whether it continues the text before); None for the text of a record that is left out."""
        path = file.path
        if file.identity is not None:
            data = b"".join(chunks(path)).removeprefix(BOM)
            yield decoded(data, path, 0), data, False
            return
        rows = rows_of(path, self.text_field, [condition.field for condition in self.conditions])
        if rows is not None:
            for row in rows:
                if all(condition.holds(row.fields, row.place) for condition in self.conditions):
                    text, place = record_text(row, self.text_field), row.place
                    del row
                    yield text, _encode(text, place), False
                    del text
                else:
                    yield None, b"", False
        elif self.conditions:
            right = "name files of records, or leave out data.filter"
            raise DataError(f"{path}: a text file has no fields to filter by; {right}")
        else:
            yield from text_blocks(path, whole)


def _changed(path: Place) -> int | str:
    return path.version if isinstance(path, RemoteFile) else os.stat(path).st_mtime_ns


def text_corpus(
    key: str,
    patterns: Iterable[str],
    text_field: str,
    conditions: tuple[Condition, ...] = (),
    answers: AnswerRecords | None = None,
    copies: LocalCopies | None = None,
) -> Corpus:
    """Any text files: records are one document each, all others one a file; packed ones are unpacked.

    Raises:
      DataError: as find_files.
    """
    patterns = tuple(patterns)
    files = tuple(TextFile(path) for path in find_files(key, patterns))
    name = "1 text file" if len(files) == 1 else f"{len(files)} text files"
    return Corpus(name, files, text_field, pattern_root(patterns), conditions, answers, copies)


def section_corpus(section: DataSection, key: str) -> Corpus:
    """The documents that a data section of text names; `key` names its files in messages."""
    if section.source == "stdlib":
        return stdlib_corpus()
    return patterns_corpus(section, section.files, key)


def patterns_corpus(section: DataSection, patterns: Iterable[str], key: str) -> Corpus:
    """The documents of other files, read as those that a data section of text names."""
    conditions, answers = parse_conditions(section.filter), answer_records(section)
    return text_corpus(key, patterns, section.text_field, conditions, answers, copies_of(section))


def stdlib_corpus() -> Corpus:
    """The sources of the running Python's standard library without its tests, in an order that mixes subjects."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in NOT_STDLIB]
        paths = [pathlib.Path(directory, name) for name in names if name.endswith(".py")]
        files += [TextFile(epath.Path(path), path.relative_to(root).as_posix()) for path in paths]
    if not files:
        raise DataError(f"data.source=stdlib: no .py files under {root}; set data.source=text and data.files")
    files.sort(key=lambda file: hashlib.sha256(file.identity.encode()).digest())
    name = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return Corpus(name, tuple(files), root=os.fspath(root))


def _encode(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text holds half of a surrogate pair ({error.object[error.start]!r})") from error
