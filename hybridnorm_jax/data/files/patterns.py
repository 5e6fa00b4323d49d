"""Which files the user names: paths and URLs, glob patterns, lists of these in a file, directories of `datasets`."""

import concurrent.futures
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from hybridnorm_jax.config.data_file_names import MANIFEST
from hybridnorm_jax.data.files.companions import joined
from hybridnorm_jax.data.files.tokenized_files import could_be_directory, holds_tokens, refuse_manifest, tokenized_files
from hybridnorm_jax.data.places.remote_file import HTTP, Place, RemoteFile, plain_url, scheme_of
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.errors import DataError, first_line
from hybridnorm_jax.whole_files import expanded, is_local

# Remote patterns that are asked for at once.
FINDERS = 16
# `@FILE` is a list of paths and patterns, one a line.
LIST_MARK = "@"
COMMENT = "#"
MOST_LIST_BYTES = 64 << 20
# Of a directory that Dataset.save_to_disk of Hugging Face's `datasets` has written: its shards in their order.
STATE, SPLITS = "state.json", "dataset_dict.json"
MOST_STATE_BYTES = 16 << 20


def find_files(key: str, patterns: Iterable[str]) -> tuple[Place, ...]:
    """The files that paths and glob patterns name, each once, those of one pattern sorted.

    What belongs to one of them, such as the index NAME.ends.npy of NAME.npy, is none of them (companions.py).
    A pattern `@FILE` stands for the paths and patterns in a file. A directory that `datasets` has saved stands for its
    shards, in the order that it states, and so does a directory of tokenized text (tokenized_files.py).

    Raises:
      DataError: another directory, a name without a file, or a place that cannot be asked; the message names `key`, or
        the place.
    """
    found: dict[str, Place] = {}
    names = tuple(listed(key, patterns))
    pool = concurrent.futures.ThreadPoolExecutor(FINDERS)
    try:
        asked = {name: pool.submit(_matches, key, name) for name in names if not is_local(name)}
        for name in names:
            for match in asked[name].result() if name in asked else _matches(key, name):
                found.setdefault(_plain(os.fspath(match)), match)
    finally:
        pool.shutdown(cancel_futures=True)
    return joined(found)


def _matches(key: str, name: str) -> Sequence[Place]:
    if directory := tokenized_files(name):
        return directory.shards()
    refuse_manifest(name)
    return _local_matches(key, name) if is_local(name) else _remote_matches(key, name)


def _remote_matches(key: str, pattern: str) -> Sequence[Place]:
    store, shown = store_of(pattern), RemoteFile(pattern, 0, "")
    matches = store.find(pattern)
    if not matches:
        if store.is_directory(pattern):
            example = "" if scheme_of(pattern) in HTTP else f", such as {pattern.rstrip('/')}/*.parquet"
            wrong = f"{shown} is a directory without {MANIFEST}, which a whole one of `hybridnorm tokenize` has"
            raise DataError(f"{key}: {wrong}; name its files{example}")
        manifest = f", nor is there {shown}/{MANIFEST}" if could_be_directory(pattern) else ""
        raise DataError(f"{key}: no such file: {shown}{manifest}")
    return matches


def _local_matches(key: str, pattern: str) -> Sequence[Place]:
    path = epath.Path(expanded(pattern))
    if _is_directory(path):
        if _is_dataset(path):
            return _shards(key, path)
        raise DataError(f"{key}: {pattern} is a directory; name its files, such as {path / '*.txt'}")
    matches = [path] if _exists(path) else _glob(os.fspath(path))
    if not matches:
        raise DataError(f"{key}: no such file: {pattern}")
    return matches


def listed(key: str, patterns: Iterable[str]) -> Iterator[str]:
    """The patterns, with the lines of every list in its place.

    A relative path in a list is relative to the list's directory. Empty lines and those that begin with # are skipped.

    Raises:
      DataError: a list that cannot be read, names nothing, or names another list.
    """
    for pattern in patterns:
        if not pattern.startswith(LIST_MARK):
            yield pattern
            continue
        path = expanded(pattern.removeprefix(LIST_MARK))
        lines = [line.strip() for line in _small_text(f"{key}: {pattern}", path, MOST_LIST_BYTES).splitlines()]
        lines = [line for line in lines if line and not line.startswith(COMMENT)]
        if not lines:
            raise DataError(f"{key}: {pattern}: the list is empty; write one path or pattern a line")
        for line in lines:
            if line.startswith(LIST_MARK):
                raise DataError(f"{key}: {pattern}: names another list, {line}; a list names files")
            is_whole = not is_local(line) or os.path.isabs(expanded(line))
            if is_whole and is_local(line) and not is_local(path):
                raise DataError(f"{key}: {pattern}: names {line}, but a remote list may name no file of this machine")
            yield line if is_whole else os.path.join(os.path.dirname(path), line)


def _small_text(what: str, path: str, most: int) -> str:
    try:
        if not is_local(path):
            store = store_of(path)
            file = next(iter(store.find(path)), None)
            if file is None or file.size > most:
                raise DataError(f"{what}: no such file" if file is None else f"{what}: too long for a list of files")
            return store.read(file, 0, file.size).decode("utf-8-sig")
        if os.path.getsize(path) > most:
            raise DataError(f"{what}: more than {most >> 20} MiB; it is no list of files")
        with open(path, encoding="utf-8-sig") as stream:
            return stream.read(most)
    except OSError as error:
        raise DataError(f"{what}: cannot be read ({error.strerror or error})") from error
    except DataError:
        raise
    except ValueError as error:  # no UTF-8, or a zero byte in the path
        raise DataError(f"{what}: no text in UTF-8 ({first_line(error)})") from error


def _is_dataset(path: epath.Path) -> bool:
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def _shards(key: str, path: epath.Path) -> list[epath.Path]:
    """The files of one saved dataset."""
    if (path / SPLITS).is_file():
        splits = _state(key, path / SPLITS).get("splits", [])
        right = ", ".join(os.fspath(path / str(split)) for split in splits) or "none that it names"
        raise DataError(f"{key}: {path} holds several splits; name those that are meant: {right}")
    state = _state(key, path / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        right = "save it again with dataset.flatten_indices().save_to_disk(DIRECTORY)"
        raise DataError(f"{key}: {path} is a selection of its rows; {right}")
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{key}: {path / STATE}: does not say which files the dataset has") from error
    if not names:
        raise DataError(f"{key}: {path} is an empty dataset")
    for name in names:
        if name != os.path.basename(name) or not (path / name).is_file():
            raise DataError(f"{key}: {path / STATE} names {name}, which is no file in that directory")
    return [path / name for name in names]


def _state(key: str, path: epath.Path) -> dict:
    try:
        state = json.loads(_small_text(f"{key}: {path}", os.fspath(path), MOST_STATE_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: {path}: not JSON ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise DataError(f"{key}: {path}: must be an object, as `datasets` writes it")
    return state


def _is_directory(path: epath.Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        return False


def _exists(path: epath.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _plain(path: str) -> str:
    return os.path.abspath(path) if is_local(path) else path


def _glob(pattern: str) -> list[epath.Path]:
    try:
        matches = [epath.Path(match) for match in glob.glob(pattern, recursive=True)]
    except (ValueError, re.error):
        return []
    return sorted(match for match in matches if not match.is_dir())


def pattern_root(patterns: Iterable[str]) -> str:
    """The deepest directory that holds everything the patterns can match: names are relative to it."""
    roots = []
    for pattern in listed("data.files", patterns):
        path = _plain(plain_url(expanded(pattern))).rstrip("/")
        parts = path.split("/")[:-1]
        # Of a dataset, or of tokens: the shards are in it.
        if _is_directory(epath.Path(path)) if is_local(path) else holds_tokens(pattern):
            parts = path.split("/")
        elif scheme_of(path) not in HTTP and not (is_local(path) and _exists(epath.Path(path))):
            parts = parts[: next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))]
        roots.append(parts)
    common = roots[0] if roots else []
    for parts in roots[1:]:
        same = [mine == other for mine, other in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return "/".join(common) or "/"
