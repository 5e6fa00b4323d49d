"""Files that belong to a file of tokens and lie beside it. They are found and fetched with it, and are no tokens.

NAME.npy   NAME.ends.npy says where its documents end, NAME.targets.npy which of its tokens are learned
NAME.bin   NAME.idx is Megatron's index
"""

import concurrent.futures
import dataclasses
import fnmatch
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

from hybridnorm_jax.data.places.patience import AccessRefusedError
from hybridnorm_jax.data.places.remote_file import HTTP, Place, RemoteFile, plain_url, scheme_of
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.errors import DataError

NUMPY, ENDS, TARGETS = ".npy", ".ends.npy", ".targets.npy"
RAW, INDEX = ".bin", ".idx"
COMPANIONS = {NUMPY: (ENDS, TARGETS), RAW: (INDEX,)}
# Remote files that are asked for at once.
ASKERS = 16


def path_beside(tokens: pathlib.Path, own_end: str, end: str) -> pathlib.Path:
    """NAME + end of the path NAME + own_end."""
    return tokens.with_name(tokens.name.removesuffix(own_end) + end)


def file_beside(tokens: Place, own_end: str, end: str) -> Place | None:
    """The file NAME + end beside NAME + own_end, if there is one; of a remote file what `with_companions` has found."""
    if isinstance(tokens, RemoteFile):
        return next((file for file in tokens.beside if file.name.endswith(end)), None)
    path = path_beside(tokens, own_end, end)
    return path if path.is_file() else None


def joined(found: Mapping[str, Place]) -> tuple[Place, ...]:
    """What was found, without the .npy files that belong to another one of them.

    Args:
      found: by path or URL. Remote files get theirs as `beside`.
    """
    names = {plain_url(name): name for name in found}
    kept = dict(found)
    for name, file in found.items():
        plain = plain_url(name)
        end = _companion_end(plain)
        owner = names.get(plain.removesuffix(end) + NUMPY) if end else None
        if owner is None:
            continue
        del kept[name]
        if isinstance(tokens := kept[owner], RemoteFile) and isinstance(file, RemoteFile):
            kept[owner] = dataclasses.replace(tokens, beside=(*tokens.beside, file))
    return tuple(kept.values())


def with_companions(files: Sequence[Place], names: Iterable[str]) -> tuple[Place, ...]:
    """Files of tokens, the remote ones with what lies beside them.

    Args:
      files: that were found.
      names: the paths, URLs and patterns that named them.

    Raises:
      DataError: one of them is no file of tokens, but belongs to one; or a place cannot be asked.
    """
    names, unknown = tuple(names), list[str]()
    with concurrent.futures.ThreadPoolExecutor(ASKERS) as pool:
        found = tuple(pool.map(lambda file: _with_companions(file, names, unknown), files))
    if unknown:
        more = f"; the same holds for {len(unknown) - 1} more files" if len(unknown) > 1 else ""
        print(f"note: {min(unknown)}{more}", file=sys.stderr, flush=True)
    return found


def _with_companions(file: Place, names: Sequence[str], unknown: list[str]) -> Place:
    """As with_companions; `unknown` gets a line for each companion that a store does not show."""
    _refuse_companion(file)
    if not isinstance(file, RemoteFile):
        return file
    own_end = next((end for end in COMPANIONS if file.name.endswith(end)), None)
    if own_end is None or (own_end == NUMPY and any(_lists_companions(name, file) for name in names)):
        return file
    beside: list[RemoteFile] = []
    for end in COMPANIONS[own_end]:
        url = _url_beside(file, own_end, end)
        try:
            beside += store_of(url).find(url)
        except AccessRefusedError:  # a bucket that lists no files says so of those that are not there
            asked = RemoteFile(url, 0, "")
            wrong = "access is refused, which may mean that it is not there"
            unknown.append(f"{asked}: {wrong}; {file.name} is read without it")
    return dataclasses.replace(file, beside=tuple(beside))


def _lists_companions(pattern: str, file: RemoteFile) -> bool:
    """Whether a pattern of a bucket, such as s3://BUCKET/DIRECTORY/*.npy, names the companions too if they are there.

    Then thousands of files need not be asked for one by one.
    """
    directory, _, name = pattern.rpartition("/")
    is_of_bucket = scheme_of(pattern) not in HTTP and directory == file.url.rpartition("/")[0]
    return is_of_bucket and name.endswith("*" + NUMPY) and fnmatch.fnmatchcase(file.name, name)


def _url_beside(file: RemoteFile, own_end: str, end: str) -> str:
    path, mark, query = file.url.partition("?") if scheme_of(file.url) in HTTP else (file.url, "", "")
    return path.removesuffix(own_end) + end + mark + query


def _companion_end(name: str) -> str | None:
    return next((end for end in COMPANIONS[NUMPY] if name.endswith(end)), None)


def _refuse_companion(file: Place) -> None:
    end = _companion_end(file.name)
    if end is None:
        return
    owner = file.name.removesuffix(end) + NUMPY
    if isinstance(file, RemoteFile):
        url = _url_beside(file, end, NUMPY)
        is_there = bool(store_of(url).find(url))
    else:
        is_there = file.with_name(owner).is_file()
    if is_there:
        raise DataError(f"{file}: belongs to {owner} and holds no tokens; name {owner} only")
