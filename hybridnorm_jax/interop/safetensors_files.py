"""The weights of a Hugging Face directory: safetensors files, one or several with an index.

Which tensors a model has is in tensor_places.py; here they are found, read, checked and written.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import MissingExtraError, UserError, first_line
from hybridnorm_jax.interop.checkpoint_files import PICKLE, PICKLES, find_file, foreign_weights, parse_json, read_json
from hybridnorm_jax.interop.tensor_places import Place, TensorTable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
# safetensors refuses a longer one.
LARGEST_HEADER = 100_000_000
STORED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _safetensors() -> ModuleType:
    """Imported where it is needed: an installation without the extra `hf` has everything else."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise MissingExtraError("Hugging Face checkpoints", extra="hf") from error
    return safetensors


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor is: its file, its name there, and the open file."""

    file: Path
    name: str
    handle: Any

    def __str__(self) -> str:
        """`file: name`, for messages."""
        return f"{self.file}: {shortened(self.name)}"

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own."""
        try:
            tensor: np.ndarray = self.handle.get_tensor(self.name)
        except (_safetensors().SafetensorError, OSError) as error:
            raise UserError(f"{self}: cannot be read: {first_line(error)}") from error
        return tensor


def _stored_tensors(files: Mapping[Path, list[str] | None], stack: contextlib.ExitStack) -> Iterator[_StoredTensor]:
    """Every tensor of some files, which close with the stack.

    Args:
      files: as _files gives them.
    """
    for file, indexed in files.items():
        handle = _open(file, stack)
        names = set(handle.keys())
        for name in indexed or ():
            if name not in names:
                raise UserError(f"{file}: does not hold {shortened(name)}, which {INDEX} places there")
        for name in sorted(names):
            yield _StoredTensor(file=file, name=name, handle=handle)


class StoredArrays(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, or of a directory's, by the names that they have there, read on demand."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        """Args:
        path: of the file, or of a directory with one or several of them.
        stack: with which the files close.
        """
        self._found: dict[str, _StoredTensor] = {}
        for stored in _stored_tensors(_files_at(path), stack):
            if stored.name in self._found:
                raise UserError(f"{stored} is also in {self._found[stored.name].file}")
            self._found[stored.name] = stored

    def __getitem__(self, name: str) -> np.ndarray:
        return self._found[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclasses.dataclass(frozen=True)
class CheckedPlaces:
    """The places of a model in a directory, and the dtypes of their tensors."""

    places: list[Place]
    dtypes: set[str]


class StoredTensors:
    """The tensors of a directory by full name, without the buffers; their data is read on demand."""

    def __init__(self, directory: Path, table: TensorTable, stack: contextlib.ExitStack):
        self._directory = directory
        self._found: dict[str, _StoredTensor] = {}  # by full name
        for stored in _stored_tensors(_files(directory), stack):
            name = table.full_name(stored.name)
            if table.is_buffer(name):
                continue
            if name in self._found:
                raise UserError(f"{stored} is also in {self._found[name].file}")
            self._found[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def where(self, name: str) -> str:
        """`file: name`, for messages."""
        return str(self._found[name])

    def check(self, places: Iterable[Place], beside: Sequence[str]) -> CheckedPlaces:
        """The places of a model, whose tensors are all there.

        Args:
          places: taken one by one. The first that is missing ends it, however many experts config.json claims.
          beside: names of tensors that may be there without a place.

        Raises:
          UserError: a tensor is missing, left over, of another shape or not of floats.
        """
        checked: list[Place] = []
        dtypes: set[str] = set()
        for place in places:
            if place.name not in self._found:
                raise UserError(f"{self._directory}: {place.name} is in no file, but {CONFIG} asks for it")
            dtypes.add(self.check_tensor(place.name, place.shape))
            checked.append(place)
        known = {place.name for place in checked}.union(beside)
        for name in self._found:
            if name not in known:
                raise UserError(f"{self.where(name)}: a model of this {CONFIG} has no place for it")
        return CheckedPlaces(places=checked, dtypes=dtypes)

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> str:
        """The dtype of a tensor, which must have this shape."""
        stored = self._found[name]
        try:
            contents = stored.handle.get_slice(stored.name)
        except (_safetensors().SafetensorError, OSError) as error:
            raise UserError(f"{self.where(name)}: cannot be read: {first_line(error)}") from error
        found, dtype = tuple(contents.get_shape()), contents.get_dtype()
        if found != shape:
            raise UserError(f"{self.where(name)}: shape {found}, but {CONFIG} asks for {shape}")
        if dtype not in STORED_DTYPES:
            right = f"must be one of {', '.join(STORED_DTYPES)}"
            raise UserError(f"{self.where(name)}: dtype {dtype} {right}")
        return STORED_DTYPES[dtype]

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory of its own."""
        return self._found[name].read()


def _files_at(path: Path) -> dict[Path, list[str] | None]:
    """The safetensors files that a path means: itself, or those of a directory; see _files."""
    if os.path.isdir(path):
        return _files(path)
    if path.suffix in PICKLES:
        raise UserError(f"{path}: {PICKLE}")
    # The caller has named it, so that it may be a link to anywhere.
    file = Path(os.path.realpath(path))
    return {find_file(file.parent, file.name): None}


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """The safetensors files, and the names that the index places in each; None without an index."""
    if _is_there(directory / WEIGHTS):
        return {find_file(directory, WEIGHTS): None}
    index = directory / INDEX
    if not _is_there(index):
        raise UserError(foreign_weights(directory) or f"{directory}: holds neither {WEIGHTS} nor {INDEX}")
    document = read_json(directory, INDEX)
    places = document.get("weight_map") if isinstance(document, dict) else None
    right = "weight_map must map names of tensors to names of files"
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: {right}")
    names: dict[str, list[str]] = {}
    for tensor, file in places.items():
        if not isinstance(file, str):
            raise UserError(f"{index}: {right}, but weight_map.{shortened(tensor)}={file!r:.80}")
        if Path(file).name != file or not file.isprintable() or not file.endswith(SUFFIX):
            right = f"must be the name of a file beside it that ends in {SUFFIX}"
            raise UserError(f"{index}: weight_map.{shortened(tensor)}={shortened(file)} {right}")
        names.setdefault(file, []).append(tensor)
    return {find_file(directory, file, asked_by=INDEX): tensors for file, tensors in names.items()}


def _is_there(file: Path) -> bool:
    """Whether something of this name is there, if only a link to nothing."""
    return file.is_symlink() or file.exists()


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    """The open file, which closes with the stack.

    The library checks that every tensor's offsets are inside the file, overlap no other's and fit its shape.
    """
    try:
        _check_header(file)
        # Read, not mapped: mapped pages would count as memory for as long as the file is open.
        return stack.enter_context(_safetensors().safe_open(file, framework="np", backend="pread"))
    except (_safetensors().SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut off: {first_line(error)}") from error


def _check_header(file: Path) -> None:
    """Raise UserError for a header that is longer than the file, no JSON, or names a tensor twice.

    The library takes the last of two entries of one name.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise UserError(f"{file}: damaged or cut off: {size} bytes are no safetensors file")
        if length > min(size - 8, LARGEST_HEADER):
            claim = f"as safetensors its header would have {length:,} bytes, but the whole file has {size:,}"
            raise UserError(f"{file}: damaged or cut off: {claim}")
        parse_json(stream.read(length), f"{file}: header")


def split_into_shards(places: Iterable[Place], itemsize: int, limit: int) -> list[list[Place]]:
    """The tensors in order, in groups of at most `limit` bytes or of one tensor."""
    shards: list[list[Place]] = []
    size = limit
    for place in places:
        num_bytes = place.size * itemsize
        if not shards or size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += num_bytes
    return shards


def write_shards(
    directory: Path, shards: Sequence[Sequence[Place]], leaves: Mapping[str, Any], dtype: np.dtype
) -> None:
    """The safetensors files, and the index where there are several.

    Args:
      leaves: of our parameters by path, jax or NumPy arrays. Of what is on a device one tensor at a time is fetched.

    Raises:
      UserError: a tensor holds NaN or Inf, in the dtype that is written.
    """
    count, total = len(shards), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = directory / (WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        total += sum(place.size * dtype.itemsize for place in shard)
        weight_map |= {place.name: file.name for place in shard}
        _write_shard(file, shard, leaves, dtype)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(file: Path, shard: Sequence[Place], leaves: Mapping[str, Any], dtype: np.dtype) -> None:
    """One file, tensor by tensor: the library's own writer wants all of them in memory at once."""
    stored = next(name for name, known in STORED_DTYPES.items() if known == dtype.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for place in shard:
        begin, end = end, end + place.size * dtype.itemsize
        header[place.name] = {"dtype": stored, "shape": list(place.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for place in shard:
            stream.write(_filled(place, leaves, dtype).reshape(-1).view(np.uint8).data)


def _filled(place: Place, leaves: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    """Their tensor, filled from our leaves."""
    tensor = np.empty(place.shape, dtype)
    with np.errstate(over="ignore"):  # What does not fit the dtype becomes Inf, which is looked for next.
        place.write(tensor, [np.asarray(leaf) for leaf in place.targets(leaves)])
    if not is_finite(tensor):
        paths = " or ".join(piece.path for piece in place.slices)
        raise UserError(f"{paths}: holds NaN or Inf, written as {dtype.name}")
    return tensor


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or Inf, by small pieces: a mask of the whole array would take memory of its own."""
    flat = array.reshape(-1)
    step = 1 << 20
    return all(np.isfinite(flat[start : start + step]).all() for start in range(0, flat.size, step))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays of one shape are of one dtype and the same, bit for bit."""
    bits = np.dtype(f"u{right.itemsize}")
    return left.dtype == right.dtype and np.array_equal(left.view(bits), right.view(bits))
