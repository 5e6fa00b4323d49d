"""The files of a checkpoint directory that somebody else has made: which of them may be opened, and JSON.

A file is opened only if it is a regular file inside the directory: a symbolic link could name any file of this machine,
a device never ends and a pipe waits for ever. The cache of Hugging Face's own tools is the exception: there each file
of models--NAME/snapshots/REVISION is a link into models--NAME/blobs.
"""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.file_formats import BOM, START_BYTES, pointer_of_git_lfs

# The largest published index of tensors has some ten megabytes.
LARGEST_JSON = 64_000_000
DEEPEST_JSON = 50
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

PICKLE = "a pickle, which can run any code and is never read; convert it to safetensors"


def find_file(directory: Path, name: str, *, asked_by: str = "") -> Path:
    """The path of the file `name` of a checkpoint, which may be opened.

    Args:
      asked_by: what names it, for the message where it is missing.

    Raises:
      UserError: it is missing, no regular file, a link that leaves the directory, or a pointer of git-lfs.
    """
    file = directory / name
    try:
        if file.is_symlink():
            _check_link(directory, file)
        kind = file.stat().st_mode
    except UserError:  # which is a ValueError
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file" + (f", but {asked_by} names it" if asked_by else "")) from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from error
    if not stat.S_ISREG(kind):
        raise UserError(f"{file}: must be a regular file")
    _check_no_pointer(file)
    return file


def _check_link(directory: Path, file: Path) -> None:
    """Raise UserError for a link that leaves the directory, unless it is one of Hugging Face's cache."""
    root, target = directory.resolve(), file.resolve(strict=True)
    is_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not is_cache:
        raise UserError(f"{file}: a symbolic link that leaves the directory; put a copy of the file in its place")


def _check_no_pointer(file: Path) -> None:
    """Raise UserError for what git clones without git-lfs in the place of a large file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(START_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or first_line(error)}") from error
    if pointer := pointer_of_git_lfs(file, start):
        raise UserError(f"{file}: {pointer}")


def read_json(directory: Path, name: str) -> Any:
    """What the JSON file `name` of a checkpoint holds.

    Raises:
      UserError: as find_file; or it is no JSON, larger or nested deeper than such files are, states a key twice, or
        holds NaN, an infinity or an integer of thousands of digits. The message names the key.
    """
    file = find_file(directory, name)
    try:
        size = file.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{file}: {size:,} bytes, more than the {LARGEST_JSON:,} that such a file may have")
        with file.open("rb") as stream:
            content = stream.read(size)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or first_line(error)}") from error
    return parse_json(content, str(file))


def parse_json(content: bytes, source: str) -> Any:
    """What a JSON text holds; see read_json.

    Args:
      content: the text, in UTF-8 without a byte order mark, as transformers reads it.
      source: the file, for messages.
    """
    if content.startswith(BOM):
        right = "begins with a byte order mark; save it as UTF-8 without one"
        raise UserError(f"{source}: cannot be read as JSON: {right}")
    try:
        text = content.decode()
        document = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_Unusable)
    except RecursionError as error:
        raise UserError(f"{source}: {_key_nested_deeply(content)}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{source}: cannot be read as JSON: {first_line(error)}") from error
    for path, wrong in _wrong_values(document, ""):
        raise UserError(f"{source}: {shortened(path) or 'its value'}: {wrong}")
    return document


class _Unusable:
    """Stands for a value that JSON or Python does not have, until its key is known."""

    def __init__(self, wrong: str):
        self.wrong = wrong


class _Object(dict):
    """A JSON object, and a key that it states twice, if there is one."""

    repeated: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found.repeated = key
            seen.add(key)
    return found


def _integer(text: str) -> Any:
    # Python refuses to convert more than 4,300 digits, without saying where they stand.
    return int(text) if len(text) <= 1000 else _Unusable(f"an integer of {len(text):,} digits")


def _wrong_values(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted path of the key, what is wrong) of everything in a document that cannot be used."""
    if depth > DEEPEST_JSON:
        yield path, "nested too deeply"
    elif isinstance(value, _Unusable):
        yield path, value.wrong if " " in value.wrong else f"{value.wrong} is no number of JSON"
    elif isinstance(value, _Object):
        if value.repeated is not None:
            yield _join(path, value.repeated), "stated twice"
        for key, item in value.items():
            yield from _wrong_values(item, _join(path, key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _wrong_values(item, path, depth + 1)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _key_nested_deeply(content: bytes) -> str:
    """The top-level key whose value is nested deeper than Python can read."""
    depth, key, last = 0, "", ""
    for match in re.finditer(rb'"((?:[^"\\]|\\.)*)"|[\[\]{}:]', content, re.DOTALL):
        token = match[0]
        if token in b"[{":
            depth += 1
            if depth > DEEPEST_JSON:
                break
        elif token in b"]}":
            depth -= 1
        elif token == b":" and depth == 1:
            key = last
        elif token != b":":
            last = match[1].decode(errors="replace")
    return shortened(key) if key else "its value"


def foreign_weights(directory: Path) -> str | None:
    """What to say of a directory that holds weights of another format than safetensors; None where it holds none."""
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLES:
            return f"{file}: {PICKLE}"
        if file.suffix in (".h5", ".msgpack", ".gguf"):
            return f"{file}: weights are read from safetensors files alone; convert it to safetensors"
    return None
