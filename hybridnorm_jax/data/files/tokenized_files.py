"""Directories of tokenized text, on a disk or in any remote place: whether a name is one, and where its files are.

The manifest names all files of its directory. So a directory is read from a web server too, which lists nothing.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from hybridnorm_jax.config.data_file_names import MANIFEST, UNFINISHED, is_tokenized, source_of_ending
from hybridnorm_jax.data.files.identity import identities, regular_file_size
from hybridnorm_jax.data.files.manifest import FileRecord, Manifest, ShardRecord
from hybridnorm_jax.data.places.local_copies import LocalCopies
from hybridnorm_jax.data.places.remote_file import HTTP, Place, RemoteFile, scheme_of, url_in
from hybridnorm_jax.data.places.store import content_of, find_one, store_of
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import expanded, is_local

MOST_MANIFEST_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class TokenizedFiles:
    """The files of a whole directory of tokenized text.

    Attributes:
      path: of the directory; of a remote one only for messages.
      manifest: what it says of itself.
      places: the place of every file that the manifest names, by name.
    """

    path: Place
    manifest: Manifest
    places: Mapping[str, Place]

    def shards(self, splits: Sequence[str] | None = None) -> tuple[Place, ...]:
        """The files of tokens of splits, of all where none are named; remote ones with what lies beside them."""
        records = self.manifest.shards
        return tuple(self._shard(one) for split in (records if splits is None else splits) for one in records[split])

    def check_content(self) -> None:
        """Look at the sampled content of all files (identity.py).

        Raises:
          DataError: a file is not what it was when the manifest was written.
        """
        files = self.manifest.files
        for file, found in zip(files, identities(self.places[file.name] for file in files), strict=True):
            if (found.size, found.digest) != (file.size, file.digest):
                raise _changed(self.path, file)

    def _shard(self, shard: ShardRecord) -> Place:
        tokens = self.places[shard.file.name]
        if not isinstance(tokens, RemoteFile):
            return tokens
        beside = tuple(self.places[file.name] for file in (shard.ends, shard.targets) if file is not None)
        return dataclasses.replace(tokens, beside=beside)


def holds_tokens(name: str) -> bool:
    """Whether a path or URL names a directory that `hybridnorm tokenize` has written, or begun.

    Raises:
      DataError: a URL that cannot be right, or a place that cannot be asked.
    """
    if is_local(name):
        return is_tokenized(expanded(name))
    if not could_be_directory(name):
        return False
    store_of(name)  # says what is wrong with the URL as it was named
    return any(find_one(url_in(name, file)) is not None for file in (MANIFEST, UNFINISHED))


def could_be_directory(url: str) -> bool:
    """Whether a URL is no pattern, and has no ending of a data file: only then a remote place is asked."""
    is_pattern = scheme_of(url) not in HTTP and any(sign in url for sign in "*?[")
    return not is_pattern and source_of_ending(url) is None


def tokenized_files(name: str) -> TokenizedFiles | None:
    """The directory of tokenized text that a path or URL names, after a look at the sizes of all of its files.

    None: the name is of something else, or of nothing.

    Raises:
      DataError: the directory is not whole, a file is missing or has another size, or the place cannot be asked.
    """
    if not holds_tokens(name):
        return None
    path = epath.Path(expanded(name)) if is_local(name) else RemoteFile(name, 0, "")
    content = _manifest_content(name)
    if content is None:
        right = "`hybridnorm tokenize` with the same arguments goes on"
        if is_local(name):
            right += ", unless its text has changed: then remove the directory and begin again"
        else:
            right += " where it was begun; copy the directory when it is whole"
        raise DataError(f"{path}: is not whole: it was stopped while it was written; {right}")
    try:
        manifest = Manifest.parse(content)
    except ValueError as error:
        raise DataError(f"{_shown(path, MANIFEST)}: cannot be read ({error}); make the directory again") from error
    found = TokenizedFiles(path, manifest, dict(_places(name, path, manifest.files)))
    for file in manifest.files:
        if regular_file_size(found.places[file.name]) != file.size:
            raise _changed(path, file)
    return found


def fetched(directories: Iterable[TokenizedFiles], copies: LocalCopies) -> tuple[TokenizedFiles, ...]:
    """The same directories with all of their files on this machine.

    Raises:
      DataError: as LocalCopies.fetched, which has room for all of them together or for none.
    """
    directories = tuple(directories)
    places = iter(copies.fetched([place for one in directories for place in one.places.values()]))
    return tuple(dataclasses.replace(one, places={name: next(places) for name in one.places}) for one in directories)


def refuse_manifest(name: str) -> None:
    """Raise DataError for a path or URL of a manifest: it is read with its directory, by the directory's name."""
    path, mark, query = name.partition("?") if scheme_of(name) in HTTP else (name, "", "")
    directory, _, last = path.rpartition("/")
    if last != MANIFEST:
        return
    directory = directory or ("." if path == MANIFEST else "/")
    try:
        Manifest.parse(_manifest_content(directory + mark + query) or b"")
    except ValueError:  # another file of this name, or none
        return
    raise DataError(f"{path}: is the manifest of a directory of tokens; name the directory, {directory}")


def _manifest_content(name: str) -> bytes | None:
    if is_local(name):
        path = epath.Path(expanded(name)) / MANIFEST
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    file = find_one(url_in(name, MANIFEST))
    return None if file is None else content_of(file, most=MOST_MANIFEST_BYTES)


def _places(name: str, path: Place, files: Sequence[FileRecord]) -> Iterator[tuple[str, Place]]:
    """The name and the place of every file.

    Raises:
      DataError: one is missing.
    """
    names = [file.name for file in files]
    if isinstance(path, RemoteFile):
        found = store_of(name).find_in(name, names)
    else:
        found = {one: path / one for one in names if (path / one).is_file()}
    for one in names:
        if one not in found:
            wrong = f"is missing, but {_shown(path, MANIFEST)} names it"
            raise DataError(f"{_shown(path, one)}: {wrong}; copy the whole directory again")
        yield one, found[one]


def _changed(path: Place, file: FileRecord) -> DataError:
    wrong = f"is not the file that {_shown(path, MANIFEST)} names: it has changed, or was not copied whole"
    return DataError(f"{_shown(path, file.name)}: {wrong}; make or copy the directory again")


def _shown(directory: Place, name: str) -> str:
    return f"{str(directory).rstrip('/')}/{name}"
