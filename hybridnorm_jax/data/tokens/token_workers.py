"""Who turns texts into ids: this process with the threads of the library `tokenizers`, or processes of their own.

Both are asked in the same way and answer with futures, so that whoever asks can read on and take the answers in order.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.data.text.answers import Part
from hybridnorm_jax.data.tokens.answer_tokens import encode_records
from hybridnorm_jax.data.tokens.tokenizers import LongTokens, Tokenizer, load_tokenizer
from hybridnorm_jax.errors import DataError

# Characters that are tokenized at once, in texts that are not longer. A process has one thread, and needs 100 bytes of
# memory for each byte of them.
BATCH_CHARACTERS = 1 << 19
PROCESS_BATCH_CHARACTERS = 1 << 17
# A longer text is tokenized in pieces.
LONG_CHARACTERS = 1 << 18
# Bytes of text that wait for each process, or are tokenized there: several pieces of several long texts.
WAITING_BYTES = 4 << 20


class Ids(NamedTuple):
    """The ids of a text, or of a part of one.

    Attributes:
      pieces: the ids.
      words: how many whitespace separates in the text.
      targets: of a record of which only a part is learned: for each piece which of its tokens are.
      ends_with_target: of such a record: whether its separator is learned.
    """

    pieces: list[np.ndarray]
    words: int
    targets: list[np.ndarray] | None = None
    ends_with_target: bool = True


class _Texts:
    """What one process does: texts at once, or one long text after the other in parts."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = id_dtype(tokenizer)
        self._long: LongTokens | None = None

    def batch(self, texts: Sequence[Sequence[str]]) -> list[Ids]:
        """The ids of several texts, each of which comes in parts."""
        encoded = self._tokenizer.encode_batch(["".join(parts) for parts in texts])
        return [Ids([ids.astype(self._dtype)], _count_words(parts)) for ids, parts in zip(encoded, texts, strict=True)]

    def records(self, records: Sequence[Sequence[Part]]) -> list[Ids]:
        """The ids of several records of which only a part is learned."""
        return [
            Ids(
                [marked.ids.astype(self._dtype)],
                _count_words([part.text for part in parts]),
                targets=[marked.is_target],
                ends_with_target=marked.ends_with_target,
            )
            for parts, marked in zip(records, encode_records(self._tokenizer, records), strict=True)
        ]

    def feed(self, parts: Sequence[str]) -> Ids:
        """Begin a long text, or go on with it."""
        if self._long is None:
            self._long = self._tokenizer.long_text()
        pieces = []
        for text in parts:
            pieces += self._long.feed(text)
        return Ids([ids.astype(self._dtype) for ids in pieces], _count_words(parts))

    def finish(self) -> Ids:
        """End a long text."""
        pieces, self._long = self._long.finish(), None
        return Ids([ids.astype(self._dtype) for ids in pieces], 0)


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The dtype in which the ids of a tokenizer are stored."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _count_words(parts: Sequence[str]) -> int:
    return sum(len(part.split()) for part in parts)


class Workers(Protocol):
    """Those who tokenize.

    Attributes:
      batch_characters: how much text they want at once.
      waiting_bytes: how much text may wait for them in all.
    """

    batch_characters: int
    waiting_bytes: int

    def batch(self, texts: Sequence[Sequence[str]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """The ids of several texts, of `size` bytes together."""

    def records(self, records: Sequence[Sequence[Part]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """The ids of several records of which only a part is learned."""

    def long_text(self) -> "LongText":
        """Begin a text that comes in parts."""


class LongText(Protocol):
    """A text that comes in parts."""

    def feed(self, parts: Sequence[str], size: int) -> concurrent.futures.Future[Ids]:
        """Go on with the text."""

    def finish(self) -> concurrent.futures.Future[Ids]:
        """End it."""


class ThisProcess:
    """This process tokenizes, as soon as it is asked."""

    waiting_bytes = 0

    def __init__(self, tokenizer: Tokenizer):
        self._texts = _Texts(tokenizer)
        self.batch_characters = BATCH_CHARACTERS

    def batch(self, texts: Sequence[Sequence[str]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """As Workers."""
        return _done(self._texts.batch(texts))

    def records(self, records: Sequence[Sequence[Part]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """As Workers."""
        return _done(self._texts.records(records))

    def long_text(self) -> "ThisProcess":
        """As Workers."""
        return self

    def feed(self, parts: Sequence[str], size: int) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return _done(self._texts.feed(parts))

    def finish(self) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return _done(self._texts.finish())


def _done(result: Any) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_result(result)
    return future


class ReadyIds:
    """Nobody tokenizes: what is read are ids already, in parts that are 1-D arrays."""

    waiting_bytes = 0
    batch_characters = BATCH_CHARACTERS

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype

    def batch(self, texts: Sequence[Sequence[np.ndarray]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """As Workers."""
        return _done([self._ids(parts) for parts in texts])

    def long_text(self) -> "ReadyIds":
        """As Workers."""
        return self

    def feed(self, parts: Sequence[np.ndarray], size: int) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return _done(self._ids(parts))

    def finish(self) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return _done(Ids([], 0))

    def _ids(self, parts: Sequence[np.ndarray]) -> Ids:
        return Ids([part.astype(self._dtype) for part in parts], 0)


class Processes:
    """Processes of their own, each with one thread. What is asked goes to the one that has the least to do."""

    def __init__(self, tokenizer: Tokenizer, separator: str, count: int):
        """Start them.

        Args:
          tokenizer: every process loads its file for itself.
          separator: data.separator.
          count: of processes.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        call = functools.partial(_call, tokenizer.name, separator, tokenizer.fingerprint)
        self._processes = [_Process(context, call) for _ in range(count)]
        self.batch_characters = PROCESS_BATCH_CHARACTERS
        self.waiting_bytes = count * WAITING_BYTES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What waits is dropped. What is being tokenized ends first: without waiting, Python's own end may complain.
        for process in self._processes:
            process.executor.shutdown(wait=True, cancel_futures=True)

    def batch(self, texts: Sequence[Sequence[str]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """As Workers."""
        return self._idlest().submit(size, "batch", texts)

    def records(self, records: Sequence[Sequence[Part]], size: int) -> concurrent.futures.Future[list[Ids]]:
        """As Workers."""
        return self._idlest().submit(size, "records", records)

    def long_text(self) -> LongText:
        """As Workers."""
        return _LongTextThere(self._idlest())

    def processor_seconds(self) -> float:
        """How long they have worked since they began to load the tokenizer, all together."""
        return sum(process.executor.submit(time.process_time).result() for process in self._processes)

    def _idlest(self) -> "_Process":
        return min(self._processes, key=lambda process: process.waiting)


class _Process:
    """An executor of one process."""

    def __init__(self, context: Any, call: Callable[..., Any]):
        self.executor = concurrent.futures.ProcessPoolExecutor(1, context, _begin)
        self._call = call
        self._asked: list[tuple[concurrent.futures.Future, int]] = []

    @property
    def waiting(self) -> int:
        """Bytes that are not done yet; of an empty text one."""
        self._asked = [(future, size) for future, size in self._asked if not future.done()]
        return sum(size + 1 for _, size in self._asked)

    def submit(self, size: int, method: str, *arguments: Any) -> concurrent.futures.Future:
        """Ask for what a method of _Texts returns."""
        future = self.executor.submit(self._call, method, *arguments)
        self._asked.append((future, size))
        return future


class _LongTextThere:
    """A long text in one of the processes."""

    def __init__(self, process: _Process):
        self._process = process

    def feed(self, parts: Sequence[str], size: int) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return self._process.submit(size, "feed", list(parts))

    def finish(self) -> concurrent.futures.Future[Ids]:
        """As LongText."""
        return self._process.submit(0, "finish")


@functools.cache
def _texts(name: str, separator: str, fingerprint: str) -> _Texts:
    """Of a process that was started to tokenize."""
    tokenizer = load_tokenizer(DataSection(tokenizer=name, separator=separator))
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"data.tokenizer={name}: was changed a moment ago; start again")
    return _Texts(tokenizer)


def _begin() -> None:
    """What such a process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C goes to all processes of a terminal: the one that has started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent has ended, however it did: nobody would ask for anything any more."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(name: str, separator: str, fingerprint: str, method: str, *arguments: Any) -> Any:
    return getattr(_texts(name, separator, fingerprint), method)(*arguments)


def result_of(future: concurrent.futures.Future) -> Any:
    """The answer.

    Raises:
      DataError: the process has ended.
    """
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        right = "with fewer of them (--processes) the same command goes on"
        raise DataError(
            f"a process that tokenizes was ended by the system, as where memory is short; {right}"
        ) from error
