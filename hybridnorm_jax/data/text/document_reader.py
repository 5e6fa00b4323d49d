"""The documents of a corpus in their order: which split each one is in, which ones are dropped, and where reading has
come to, so that it can begin there again.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from hybridnorm_jax.data.text.answers import Part
from hybridnorm_jax.data.text.blocks import held_out
from hybridnorm_jax.data.text.sources import Corpus, Document, TextFile

SPLITS = ("train", "validation")


class Place(NamedTuple):
    """How far a corpus is read, and what was found up to there.

    Attributes:
      file: of the corpus; all before it are read.
      blocks: of that file which are read: documents, or blocks of them.
      documents: that are kept, of both splits; one that is held out in blocks is still one.
      duplicates: that were dropped.
      chosen: documents or blocks that fell to either split.
      sides: whether there are some that are not held out, and some that are.
      least, most: the smallest and the largest of their digests, hexadecimal.
    """

    file: int = 0
    blocks: int = 0
    documents: int = 0
    duplicates: int = 0
    chosen: int = 0
    sides: tuple[bool, bool] = (False, False)
    least: str = "g"
    most: str = ""


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """What is held out: by its hash about `fraction`; or, with `least` or `most`, one digest, or all but one.

    The last two are for few documents, of which the hash has chosen none, or all.
    """

    fraction: float
    least: str | None = None
    most: str | None = None

    @property
    def is_by_hash(self) -> bool:
        """Whether the hash of a document alone decides."""
        return self.least is None and self.most is None

    def holds_out(self, digest: bytes) -> bool:
        """Whether the document or block of this identity is held out."""
        if self.least is not None:
            return digest.hex() == self.least
        if self.most is not None:
            return digest.hex() != self.most
        return held_out(digest, self.fraction)


class Block(NamedTuple):
    """A document, or a block of one.

    Attributes:
      split: "train" or "validation".
      text, num_bytes: as of Document.
      begins: whether it begins a text; otherwise it goes on with the block before it.
      before: the place in front of it, where reading can begin again if `begins`.
      digest: of the text that it begins, if duplicates are dropped.
      parts: as of Document.
    """

    split: str
    text: str
    num_bytes: int
    begins: bool
    before: Place
    digest: bytes | None
    parts: tuple[Part, ...] = ()


class Reader:
    """Reads a corpus from a place on.

    Attributes:
      place: how far it has come.
    """

    def __init__(self, corpus: Corpus, rule: SplitRule, *, place: Place, is_new: Callable[[bytes], bool] | None):
        """Begin.

        Args:
          corpus: what is read.
          rule: which documents are held out.
          place: where to begin.
          is_new: whether no text with this SHA-256 came before; one that did is dropped. None: all are kept.
        """
        self._corpus, self._rule, self._is_new = corpus, rule, is_new
        self._whole = corpus.holds_whole_files_out(rule.fraction)
        self.place = place

    def blocks(self) -> Iterator[Block]:
        """All that is kept."""
        first = self.place.file
        for number, file in enumerate(self._corpus.files[first:], start=first):
            if number > self.place.file:
                self.place = self.place._replace(file=number, blocks=0)
            yield from self._of_file(file)
        self.place = self.place._replace(file=len(self._corpus.files), blocks=0)

    def _of_file(self, file: TextFile) -> Iterator[Block]:
        split_before, drops = "", False
        skipped = self.place.blocks
        documents = itertools.islice(self._corpus.documents(file, whole=self._whole), skipped, None)
        # Only whole texts are compared, of which the first block alone does not know whether it is one.
        pairs = _with_next(documents) if self._is_new is not None else map(_alone, documents)
        for document, is_continued in pairs:
            before, digest = self.place, None
            if self._is_new is not None and not document.continues:
                digest = self._digest(file, document, is_continued)
                drops = not self._is_new(digest)
            if drops:
                duplicates = before.duplicates + (not document.continues)
                self.place = before._replace(blocks=before.blocks + 1, duplicates=duplicates)
                continue
            is_held_out = self._rule.holds_out(document.digest)
            self.place = _after(before, document, is_held_out)
            split = SPLITS[is_held_out]
            begins = not (document.continues and split == split_before)
            split_before = split
            block = Block(split, document.text, document.num_bytes, begins, before, digest, document.parts)
            del document  # a long one is not kept beside the next one
            yield block
            del block

    def _digest(self, file: TextFile, document: Document, is_continued: bool) -> bytes:
        """The SHA-256 of a whole text; of one that comes in blocks, these are read once more."""
        if not is_continued:
            return hashlib.sha256(document.text.encode()).digest()
        digest = hashlib.sha256()
        blocks = itertools.islice(self._corpus.documents(file, whole=self._whole), self.place.blocks, None)
        first = next(blocks)
        for block in itertools.chain([first], itertools.takewhile(lambda block: block.continues, blocks)):
            digest.update(block.text.encode())
        return digest.digest()


def _after(before: Place, document: Document, is_held_out: bool) -> Place:
    digest = document.digest.hex()
    kept, held = before.sides
    return Place(
        file=before.file,
        blocks=before.blocks + 1,
        documents=before.documents + (not document.continues),
        duplicates=before.duplicates,
        chosen=before.chosen + 1,
        sides=(kept or not is_held_out, held or is_held_out),
        least=min(before.least, digest),
        most=max(before.most, digest),
    )


def _alone(document: Document) -> tuple[Document, bool]:
    """As _with_next, where nobody asks whether the next one continues it."""
    return document, False


def _with_next(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    """(each document or block, whether the next one continues it)."""
    documents = iter(documents)
    current = next(documents, None)
    while current is not None:
        following = next(documents, None)
        yield current, following is not None and following.continues
        current = following
