"""Token ids that somebody else has written: read in place, and cut into what is trained on and what is held out."""

import dataclasses
import functools
import hashlib
import itertools
import os
import resource
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from hybridnorm_jax.data.files.file_state import UNCHANGED, FileState
from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.data.text.blocks import blocks, held_out
from hybridnorm_jax.data.tokens.token_formats import Layout, read_layout
from hybridnorm_jax.data.tokens.token_shards import TARGETS_DTYPE
from hybridnorm_jax.data.tokens.token_stream import Extent
from hybridnorm_jax.errors import DataError

MOST_OPEN = 256


class OpenFiles:
    """The files that are open at once: the last ones used, at most MOST_OPEN, and a quarter of what the system allows.

    A file is closed when it has left this list and nobody reads it any more.
    """

    def __init__(self):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, max(soft // 4, 1))
        self.open = functools.lru_cache(maxsize=most)(_Descriptor)


class _Descriptor:
    """An open file, closed when the last reference to it goes."""

    def __init__(self, path: str):
        self.number = -1  # for __del__, if os.open raises
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class TokenFile:
    """The tokens of one file, read when they are asked for: `file[start:stop]` is a 1-D array of the file's dtype.

    Attributes:
      ends: where its documents end, if an index beside it says so.
      targets: 1 for each token that is learned and 0 for the others, if a file beside it says so; None: all are.
      local_path: of the file, or of its copy on this machine.

    Raises:
      DataError: on reading, if the file is not in `state` any more, ends too early, or cannot be read.
    """

    def __init__(
        self, path: Place, layout: Layout, files: OpenFiles, *, state: FileState, targets: "TokenFile | None" = None
    ):
        self._path = str(path)
        self.local_path = readable(path)
        self._state = state
        self._layout = layout
        self._files = files
        self.dtype = layout.dtype
        self.is_raw = layout.is_raw
        self.ends = layout.ends
        self.targets = targets

    def __len__(self) -> int:
        return self._layout.count

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, _ = places.indices(len(self))
        dtype, offset = self._layout.dtype, self._layout.offset
        wanted = max(stop - start, 0) * dtype.itemsize
        try:
            file = self._files.open(self.local_path)
            self._state.check(FileState.read(file.number), self._path)
            content = _read(file, wanted, offset + start * dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if len(content) != wanted:
            raise DataError(f"{self._path}: became shorter while it was in use; {UNCHANGED}")
        return np.frombuffer(content, dtype)


def _read(file: _Descriptor, count: int, offset: int) -> bytes:
    """`count` bytes from `offset` on, fewer only at the end of the file; not moving a position, threads share it."""
    content = os.pread(file.number, count, offset)
    while len(content) < count:
        more = os.pread(file.number, count - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


def open_token_file(path: Place, raw_dtype: str, files: OpenFiles | None = None) -> TokenFile:
    """A file of integers: NumPy's, llm.c's, or raw numbers of `raw_dtype`.

    Whoever asks for its identity asks after this: what is changed then or later is not read as what it was.

    Args:
      path: of the file.
      raw_dtype: of a file without a header, "uint16" or "uint32".
      files: those that are open at once, shared by all files of a run.

    Raises:
      DataError: as read_layout; or what lies beside the file as NAME.targets.npy is no mask of its tokens.
    """
    files = files or OpenFiles()
    # Before anything else is known of the file, so that all of it is of this state or of a later one.
    state = FileState.of(path)
    layout = read_layout(path, raw_dtype)
    if layout.targets is None:
        return TokenFile(path, layout, files, state=state)
    mask_state = FileState.of(layout.targets)
    mask = TokenFile(layout.targets, read_layout(layout.targets, raw_dtype), files, state=mask_state)
    if mask.dtype != TARGETS_DTYPE or len(mask) != layout.count:
        right = f"{layout.count:,} numbers of uint8, 1 for each token that is learned and 0 for the others"
        raise DataError(f"{layout.targets}: does not say which tokens of {path} are learned: it must hold {right}")
    return TokenFile(path, layout, files, state=state, targets=mask)


class SplitExtents(NamedTuple):
    """The two parts of token files."""

    train: tuple[Extent, ...]
    held_out: tuple[Extent, ...]


class _Block(NamedTuple):
    """A block of tokens [start, stop) of a file, and the digest of its identity."""

    path: Place
    start: int
    stop: int
    digest: bytes


class _Piece(NamedTuple):
    """Tokens [start, stop) of a file, all on one side of the split."""

    path: Place
    start: int
    stop: int
    is_held_out: bool


def split_extents(arrays: Mapping[Place, TokenFile], names: tuple[str, ...], fraction: float) -> SplitExtents:
    """The training and the held-out parts of token files.

    Blocks are held out by a hash of (name, place of the block). Where the hash chooses none, or all, a part of one
    block is cut off, so that the held-out share is `fraction` of all tokens.

    Args:
      arrays: the tokens by file.
      names: the identity of each file: its path relative to the root of the patterns.
      fraction: of all tokens, about.
    """
    pieces = _pieces(arrays, names, fraction)
    sides: dict[bool, list[Extent]] = {False: [], True: []}
    for (path, side), neighbours in itertools.groupby(pieces, key=lambda piece: (piece.path, piece.is_held_out)):
        first, *others = neighbours
        stop = others[-1].stop if others else first.stop
        array = arrays[path]
        extent = Extent(array, name=os.fspath(path), start=first.start, stop=stop)
        if isinstance(array, TokenFile):
            extent = dataclasses.replace(extent, is_raw=array.is_raw, ends=array.ends, targets=array.targets)
        sides[side].append(extent)
    return SplitExtents(train=tuple(sides[False]), held_out=tuple(sides[True]))


def is_split_by_hash(arrays: Mapping[Place, TokenFile], names: tuple[str, ...], fraction: float) -> bool:
    """Whether split_extents needs no part of a block: it is the hash of a block alone that holds it out, or does not.

    Args:
      arrays, names, fraction: as for split_extents.
    """
    return fraction in (0, 1) or len(_sides(arrays, names, fraction)) == 2


def _pieces(arrays: Mapping[Place, TokenFile], names: tuple[str, ...], fraction: float) -> Iterator[_Piece]:
    if fraction in (0, 1):
        return iter([_Piece(path, 0, len(array), fraction == 1) for path, array in arrays.items()])
    sides = _sides(arrays, names, fraction)
    if len(sides) == 2:
        # A trillion tokens are millions of blocks: they are gone through anew instead of being kept.
        every = _blocks(arrays, names)
        return (_Piece(each.path, each.start, each.stop, held_out(each.digest, fraction)) for each in every)
    return _cut_one(arrays, names, fraction, all_held_out=sides == {True})


def _sides(arrays: Mapping[Place, TokenFile], names: tuple[str, ...], fraction: float) -> set[bool]:
    """Whether hashes hold blocks out: {True}: all of them; {False}: none; both: some."""
    sides: set[bool] = set()
    for block in _blocks(arrays, names):
        sides.add(held_out(block.digest, fraction))
        if len(sides) == 2:
            break
    return sides


def _cut_one(
    arrays: Mapping[Place, TokenFile], names: tuple[str, ...], fraction: float, *, all_held_out: bool
) -> Iterator[_Piece]:
    """All blocks on one side but for the end (the begin, if all are held out) of one that its hash chooses."""
    total = sum(len(array) for array in arrays.values())
    choose = max if all_held_out else min
    chosen = choose(_blocks(arrays, names), key=lambda block: block.digest)
    share = round(total * (1 - fraction if all_held_out else fraction))
    # Two tokens, so that one has a target.
    share = min(max(share, 2), chosen.stop - chosen.start)
    for block in _blocks(arrays, names):
        if block != chosen:
            yield _Piece(block.path, block.start, block.stop, all_held_out)
            continue
        cut = block.start + share if all_held_out else block.stop - share
        yield from (
            piece
            for piece in (_Piece(block.path, block.start, cut, False), _Piece(block.path, cut, block.stop, True))
            if piece.start < piece.stop
        )


def _blocks(arrays: Mapping[Place, TokenFile], names: tuple[str, ...]) -> Iterator[_Block]:
    for (path, array), name in zip(arrays.items(), names, strict=True):
        for start, stop in blocks(len(array)):
            yield _Block(path, start, stop, hashlib.sha256(f"{name}:{start}".encode()).digest())
