"""Documents become files of tokens: read here in their order, tokenized by workers, written here in the same order.

So the files do not depend on who tokenizes. Every few seconds they are written to the disk, together with the place in
the input up to which they are whole (tokenizing_progress.py): a process that follows a killed one goes on there, and
writes the files that the first would have written.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from hybridnorm_jax.data.files.manifest import Manifest
from hybridnorm_jax.data.text.answers import Part
from hybridnorm_jax.data.text.document_reader import SPLITS, Block, Place, Reader, SplitRule
from hybridnorm_jax.data.text.sources import Corpus
from hybridnorm_jax.data.tokens.token_shards import SHARD_TOKENS, SplitState, SplitWriter
from hybridnorm_jax.data.tokens.token_workers import LONG_CHARACTERS, Ids, LongText, Workers, id_dtype, result_of
from hybridnorm_jax.data.tokens.tokenized_directory import manifest_of
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.data.tokens.tokenizing_display import Display
from hybridnorm_jax.data.tokens.tokenizing_progress import Progress
from hybridnorm_jax.errors import DataError

SAVE_SECONDS = 2.0
HASHERS = 4


@dataclasses.dataclass(frozen=True)
class Job:
    """What is tokenized, and how.

    Attributes:
      corpus: what is read.
      tokenizer: its separator, if it has one, ends every document.
      fraction: the share of documents that is held out.
      drops_duplicates: whether a document whose text came before is left out.
      shard_tokens: tokens after which a shard ends with its document.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    fraction: float
    drops_duplicates: bool = False
    shard_tokens: int = SHARD_TOKENS

    def inputs(self) -> dict[str, Any]:
        """Everything that decides what the files hold, as it is kept in JSON."""
        return {
            "corpus": self.corpus.name,
            "files": self.corpus.signature(),
            "text_field": self.corpus.text_field,
            "tokenizer": self.tokenizer.fingerprint,
            "separator": self.tokenizer.separator_id,
            "fraction": self.fraction,
            "drops_duplicates": self.drops_duplicates,
            "shard_tokens": self.shard_tokens,
        }


def write_tokens(directory: pathlib.Path, job: Job, workers: Workers, *, shown: bool) -> Manifest:
    """Write a directory of tokens, or go on with one; its manifest, which is written last, makes it a whole one.

    Args:
      directory: exists.
      job: what is written.
      workers: who tokenizes.
      shown: whether a bar, or lines, on standard error say how far it is.

    Raises:
      DataError: text that cannot be read, or that changes meanwhile; another process is writing there; what was
        written there before is something else.
      OSError: the directory cannot be written; what was done is kept.
    """
    with Progress(directory) as progress:
        inputs = json.loads(json.dumps(job.inputs()))
        state = progress.load()
        if state is None:
            state = _new_state(inputs, {})
            progress.save(state)
        check_same_inputs(directory, state["inputs"], inputs)
        while True:
            one_pass = _Pass(directory, job, workers, progress, state)
            with Display(job.corpus.name, len(job.corpus.files), shown=shown) as display:
                place = one_pass.run(display)
            rule = _next_rule(one_pass.rule, place)
            if rule is None:
                break
            state = _new_state(inputs, rule)
            progress.forget_digests()
            progress.save(state)
        if job.corpus.signature() != inputs["files"]:
            raise DataError(f"{job.corpus.name}: a file was changed while it was read; begin again in a new directory")
        manifest = one_pass.manifest(place)
        manifest.write(directory)
        progress.remove()
    return manifest


def check_same_inputs(directory: pathlib.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError where a directory holds, or was begun with, what is made of other inputs."""
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        right = "give the same, name another directory, or remove this one"
        raise DataError(f"{directory}: was made, or begun, with other inputs ({names} differ); {right}")


def _new_state(inputs: dict[str, Any], rule: dict[str, str]) -> dict[str, Any]:
    splits = {split: dataclasses.asdict(SplitState()) for split in SPLITS}
    return {"inputs": inputs, "rule": rule, "place": Place()._asdict(), "splits": splits}


def _next_rule(rule: SplitRule, place: Place) -> dict[str, str] | None:
    """The rule by which all is tokenized once more, where the hash has chosen no document, or all; None: it is done."""
    fraction = rule.fraction
    if fraction in (0, 1) or not rule.is_by_hash or all(place.sides):
        return None
    if place.least == place.most:
        same = "all documents are the same"
        what = same if place.chosen > 1 else "there is one document, or one block of lines, only"
        right = "give more text, or set it to 0 and name files in data.validation"
        raise DataError(f"data.validation_fraction={fraction}: {what}, and of one nothing can be held out; {right}")
    kept, _ = place.sides
    return {"least": place.least} if kept else {"most": place.most}


class _Pending(NamedTuple):
    """Texts that are being tokenized, or a part of one.

    Attributes:
      future: Ids of each text, or of the part.
      texts: (split, bytes of UTF-8) of each.
      ends: whether they are whole with this.
      after: the place behind them, if reading can begin again there.
      digests: of those of them that duplicates are compared with.
      cut_words: words that the part begins inside, so that they were counted with the part before.
    """

    future: concurrent.futures.Future
    texts: list[tuple[str, int]]
    ends: bool
    after: Place | None
    digests: list[bytes]
    cut_words: int = 0

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(size for _, size in self.texts)

    def results(self) -> list[Ids]:
        """What became of them; waits for it."""
        result = result_of(self.future)
        return [result] if isinstance(result, Ids) else result


class _Text:
    """A text that is read: parts that are not yet on their way, and who tokenizes it if it is long."""

    def __init__(self, split: str):
        self.split = split
        self.parts: list[str] = []
        self.record: tuple[Part, ...] = ()
        self.characters = self.bytes = 0
        self.digests: list[bytes] = []
        self.long: LongText | None = None

    def add(self, block: Block) -> None:
        """Go on with it."""
        self.parts.append(block.text)
        self.record = block.parts
        self.characters += len(block.text)
        self.bytes += block.num_bytes
        if block.digest is not None:
            self.digests.append(block.digest)

    def take(self) -> tuple[list[str], int, list[bytes]]:
        """(the parts, their bytes, the digests) so far, which are then no longer here."""
        taken = self.parts, self.bytes, self.digests
        self.parts, self.characters, self.bytes, self.digests = [], 0, 0, []
        return taken


class _Pass:
    """Goes through the corpus once, from where the state says."""

    def __init__(self, directory: pathlib.Path, job: Job, workers: Workers, progress: Progress, state: dict[str, Any]):
        self._directory, self._job, self._workers, self._progress = directory, job, workers, progress
        self._state = state
        self.rule = SplitRule(job.fraction, **state["rule"])
        place = Place(**state["place"])
        self._place = place._replace(sides=tuple(place.sides))
        is_new = progress.is_new if job.drops_duplicates else None
        self._reader = Reader(job.corpus, self.rule, place=self._place, is_new=is_new)
        dtype = id_dtype(job.tokenizer)
        separator = job.tokenizer.separator_id
        self._separator = np.array([] if separator is None else [separator], dtype)
        self._writers = {
            split: SplitWriter(
                directory,
                split,
                dtype=dtype,
                shard_tokens=job.shard_tokens,
                state=SplitState(**state["splits"][split]),
                has_targets=job.corpus.answers is not None,
            )
            for split in SPLITS
        }
        self._batch: list[_Text] = []
        self._batch_after: Place | None = None
        self._pending: collections.deque[_Pending] = collections.deque()
        self._waiting = 0
        self._digests: list[bytes] = []
        self._saved = time.monotonic()

    def run(self, display: Display) -> Place:
        """Write everything; returns the place behind the last document."""
        self._display = display
        with contextlib.ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            text: _Text | None = None
            for block in self._reader.blocks():
                if block.begins:
                    self._end(text, block.before)
                    text = _Text(block.split)
                text.add(block)
                if not text.record and (text.long is not None or text.characters > LONG_CHARACTERS):
                    self._feed(text)
                del block  # a long document is not kept beside the next one
            self._end(text, self._reader.place)
            self._flush()
            while self._pending:
                self._write_next()
            self._place = self._reader.place  # behind duplicates too
            self._save()
            with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
                self._shards = {split: writer.finish(pool) for split, writer in self._writers.items()}
        return self._place

    def manifest(self, place: Place) -> Manifest:
        """What is said of the files."""
        states = {split: writer.state for split, writer in self._writers.items()}
        return manifest_of(
            inputs=self._state["inputs"],
            tokenizer=self._job.tokenizer,
            documents=place.documents,
            duplicates=place.duplicates,
            is_split_by_hash=self.rule.fraction in (0, 1) or self.rule.is_by_hash,
            states=states,
            shards=self._shards,
        )

    def _feed(self, text: _Text) -> None:
        """What there is of a long text goes on its way."""
        if text.long is None:
            self._flush()
            text.long = self._workers.long_text()
        parts, _, digests = text.take()
        for part in parts:
            # A document may be long: never is all of it on its way, nor are its words in memory.
            for start in range(0, len(part), LONG_CHARACTERS):
                piece = part[start : start + LONG_CHARACTERS]
                is_cut = start > 0 and not part[start - 1].isspace() and not piece[0].isspace()
                texts = [(text.split, len(piece.encode()))]
                future = text.long.feed([piece], texts[0][1])
                self._push(_Pending(future, texts, ends=False, after=None, digests=digests, cut_words=int(is_cut)))
                digests = []

    def _end(self, text: _Text | None, after: Place) -> None:
        """No part of a text follows."""
        if text is None:
            return
        if text.long is not None:
            future = text.long.finish()
            self._push(_Pending(future, [(text.split, 0)], ends=True, after=after, digests=[]))
            return
        self._batch.append(text)
        self._batch_after = after
        if sum(one.characters for one in self._batch) >= self._workers.batch_characters:
            self._flush()

    def _flush(self) -> None:
        """The short texts that were read go on their way."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        texts = [(text.split, text.bytes) for text in batch]
        digests = [digest for text in batch for digest in text.digests]
        size = sum(text.bytes for text in batch)
        if self._job.corpus.answers is None:
            future = self._workers.batch([text.parts for text in batch], size)
        else:
            future = self._workers.records([text.record for text in batch], size)
        self._push(_Pending(future, texts, ends=True, after=self._batch_after, digests=digests))

    def _push(self, pending: _Pending) -> None:
        self._pending.append(pending)
        self._waiting += pending.size
        while self._pending and self._waiting > self._workers.waiting_bytes:
            self._write_next()

    def _write_next(self) -> None:
        pending = self._pending.popleft()
        self._waiting -= pending.size
        for ids, (split, size) in zip(pending.results(), pending.texts, strict=True):
            writer = self._writers[split]
            for piece, targets in zip(ids.pieces, ids.targets or [None] * len(ids.pieces), strict=True):
                writer.write(piece, targets)
            if pending.ends:
                writer.end(self._separator, None if ids.targets is None else np.array([ids.ends_with_target]))
            writer.state.bytes += size
            writer.state.words += ids.words - pending.cut_words
        self._digests += pending.digests
        states = [writer.state for writer in self._writers.values()]
        tokens, num_bytes = sum(state.tokens for state in states), sum(state.bytes for state in states)
        self._display.update(self._reader.place.file, tokens, num_bytes)
        if pending.after is not None:
            self._place = pending.after
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._save()

    def _save(self) -> None:
        splits = {split: writer.flush() for split, writer in self._writers.items()}
        self._state = self._state | {"place": self._place._asdict(), "splits": splits}
        self._progress.save(self._state, self._digests)
        self._digests = []
        self._saved = time.monotonic()
