"""Hugging Face checkpoints in and out: a directory of config.json and safetensors files.

No torch is needed and no pickle is read. What config.json means stands in architectures.py, where every tensor
belongs in tensors.py; here the directory is read and written.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.fields import check_choice
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json, config_to_json
from hybridnorm_jax.interop.tensors import TABLES, Place, TensorTable, leaf_shapes
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load_huggingface(
    path: str | Path, *, dtype: str | None = None, ignore_keys: Sequence[str] = ()
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a Hugging Face directory: `Decoder(config).apply({"params": params}, tokens)` gives its logits.

    Architectures: GPT-2, GPT-NeoX (sequential and parallel residual), OPT (with norms before the sublayers), Llama,
    Qwen3, OLMo 2, OLMoE (every expert is a tensor of its own in the files). Tensors are read one at a time into the
    stacked leaves: beyond the parameters themselves, host memory is needed for one tensor, or for two while a tied
    model's own copy of the head is compared.

    Args:
      path: directory with config.json and model.safetensors, or shards and model.safetensors.index.json.
      dtype: of the parameters (float64, float32, bfloat16, float16), converted while reading; by default as stored.
      ignore_keys: keys of config.json to read as if they were absent.

    Returns:
      config: its param_dtype is that of the parameters, its compute dtype float32, the nearest to what the authors
        published; `dataclasses.replace(config, dtype="bfloat16")` for another. Dropout is 0 and the initializer our
        default: neither is taken over.
      params: the tree described in decoder.py, NumPy arrays.

    Raises:
      UserError: the directory, config.json or a tensor is missing, damaged or not understood; a tensor is left over,
        of another shape than config.json says, not floating-point, or holds NaN or Inf.
    """
    if dtype is not None:
        check_choice("dtype", dtype, PARAM_DTYPES)
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}")
    file = directory / CONFIG
    name, config = config_from_json(_read_json(file), str(file), ignore_keys)
    table = TABLES[name]
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(directory, table, stack)
        places, stored = tensors.check(table.places(config), beside=(table.head,) if config.tie_embeddings else ())
        dtype = dtype or _stored_dtype(stored, directory)
        if config.tie_embeddings:
            _check_tied_head(tensors, table, places[0])
        params = _read_params(tensors, places, leaf_shapes(config), jnp.dtype(dtype))
    return dataclasses.replace(config, param_dtype=dtype), params


def save_huggingface(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    architecture: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a Hugging Face directory that transformers loads; `load_huggingface` gives the same bits back.

    The directory appears whole or not at all. One shard at a time is copied in memory.

    Args:
      path: directory to write; it must not exist or be empty.
      config: of the model.
      params: of `Decoder(config)`, jax or NumPy arrays of config.param_dtype.
      architecture: model_type to write; by default the first that expresses the model exactly.
      extra: further keys of config.json, such as bos_token_id, or max_position_embeddings of a model with rope.
      max_shard_bytes: a larger model is written as several files.

    Raises:
      UserError: no architecture, or not the named one, expresses the model exactly (the message says what is in the
        way); the parameters are not of this config or not finite; `extra` contradicts the model or is not known for
        the architecture; the path is taken.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already; name a new directory")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    name, decided = config_to_json(config, architecture)
    text = _config_text(name, decided, config, extra or {})
    leaves = _host_leaves(config, params)
    shards = _shards(TABLES[name].places(config), jnp.dtype(config.param_dtype).itemsize, max_shard_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be made, {path.parent} cannot be written to")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        directory = Path(scratch) / "checkpoint"
        directory.mkdir()
        (directory / CONFIG).write_text(text)
        _write_shards(directory, shards, leaves, jnp.dtype(config.param_dtype))
        directory.replace(path)


# ---- Reading


def _safetensors() -> ModuleType:
    """Imported where it is needed: an installation without the extra `hf` has everything else."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise MissingExtraError("Hugging Face checkpoints", extra="hf") from error
    return safetensors


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Tensors:
    """The tensors of a directory by full name, without the buffers; their data is read on demand."""

    def __init__(self, directory: Path, table: TensorTable, stack: contextlib.ExitStack):
        self.directory = directory
        self.found: dict[str, tuple[Path, str, Any]] = {}  # full name -> file, name in the file, the open file
        for file, indexed in _files(directory).items():
            handle = _open(file, stack)
            names = set(handle.keys())
            for raw in indexed or ():
                if raw not in names:
                    raise UserError(f"{file}: does not hold {raw}, which {INDEX} places there")
            for raw in sorted(names):
                name = table.full_name(raw)
                if table.is_buffer(name):
                    continue
                if name in self.found:
                    raise UserError(f"{file}: {raw} is also in {self.found[name][0]}")
                self.found[name] = file, raw, handle

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def where(self, name: str) -> str:
        """`file: name`, for messages."""
        file, raw, _ = self.found[name]
        return f"{file}: {raw}"

    def check(self, places: Iterable[Place], beside: Sequence[str]) -> tuple[list[Place], set[str]]:
        """The places, and their tensors' dtypes; raises for one missing, left over, of another shape or not of floats.

        `beside` names tensors that may be there without a place. Places are taken one by one: the first that is
        missing ends it, however many experts config.json claims.
        """
        checked, dtypes = [], set()
        for place in places:
            if place.name not in self.found:
                raise UserError(f"{self.directory}: {place.name} is in no file, but {CONFIG} asks for it")
            dtypes.add(self.check_tensor(place.name, place.shape))
            checked.append(place)
        known = {place.name for place in checked}.union(beside)
        for name in self.found:
            if name not in known:
                raise UserError(f"{self.where(name)}: a model of this {CONFIG} has no place for it")
        return checked, dtypes

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> str:
        """The dtype of a tensor of this shape."""
        _, raw, handle = self.found[name]
        stored = handle.get_slice(raw)
        if tuple(stored.get_shape()) != shape:
            raise UserError(f"{self.where(name)}: shape {tuple(stored.get_shape())}, but {CONFIG} asks for {shape}")
        if stored.get_dtype() not in STORED_DTYPES:
            right = f"must be one of {', '.join(STORED_DTYPES)}"
            raise UserError(f"{self.where(name)}: dtype {stored.get_dtype()} {right}")
        return STORED_DTYPES[stored.get_dtype()]

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory of its own."""
        _, raw, handle = self.found[name]
        try:
            return handle.get_tensor(raw)
        except (_safetensors().SafetensorError, OSError) as error:
            raise UserError(f"{self.where(name)}: cannot be read: {_one_line(error)}") from error


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """The safetensors files, and the names that the index places in each; None without an index."""
    if (directory / WEIGHTS).exists():
        return {directory / WEIGHTS: None}
    index = directory / INDEX
    if not index.exists():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        if pickles:
            right = "a pickle, which can run any code and is never read; convert it to safetensors"
            raise UserError(f"{directory / pickles[0]}: {right}")
        raise UserError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}")
    document = _read_json(index)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: weight_map must map names of tensors to names of files")
    files: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        if Path(file).name != file:
            raise UserError(f"{index}: weight_map.{name}={file} must be the name of a file beside it")
        files.setdefault(directory / file, []).append(name)
    return files


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: no such file, but {INDEX} names it")
    safetensors = _safetensors()
    try:
        # Read, not mapped: mapped pages would count as memory for as long as the file is open.
        return stack.enter_context(safetensors.safe_open(file, framework="np", backend="pread"))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut off: {_one_line(error)}") from error


def _stored_dtype(dtypes: set[str], directory: Path) -> str:
    if len(dtypes) > 1:
        raise UserError(f"{directory}: tensors of several dtypes ({', '.join(sorted(dtypes))}); pass dtype= to convert")
    return next(iter(dtypes))


def _check_tied_head(tensors: _Tensors, table: TensorTable, embedding: Place) -> None:
    """A tied model's file may hold the head as well, if it is the embedding, bit for bit."""
    if table.head not in tensors:
        return
    tensors.check_tensor(table.head, embedding.shape)
    head, tied = tensors.read(table.head), tensors.read(embedding.name)
    bits = np.dtype(f"u{tied.itemsize}")
    if head.dtype != tied.dtype or not np.array_equal(head.view(bits), tied.view(bits)):
        raise UserError(f"{tensors.where(table.head)}: is not {embedding.name}, but {CONFIG} says tie_word_embeddings")


def _read_params(
    tensors: _Tensors, places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> dict[str, Any]:
    """Every tensor, one at a time, into the leaves it holds."""
    leaves = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for place in places:
        for view, target in zip(place.views(tensors.read(place.name)), place.targets(leaves), strict=True):
            with np.errstate(over="ignore"):  # What does not fit the dtype becomes Inf, which is looked for next.
                target[...] = view
            if not _is_finite(target):
                raise UserError(f"{tensors.where(place.name)}: holds NaN or Inf, read as {dtype.name}")
    return unflatten_dict(leaves, sep="/")


def _is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or Inf, by small pieces: a mask of the whole array would take memory of its own."""
    flat = array.reshape(-1)
    step = 1 << 20
    return all(np.isfinite(flat[start : start + step]).all() for start in range(0, flat.size, step))


# ---- Writing


def _config_text(name: str, decided: Mapping[str, Any], config: ModelConfig, extra: Mapping[str, Any]) -> str:
    """config.json: what the model decides, `extra`, and the bookkeeping that transformers wants."""
    for key, value in extra.items():
        if key in decided and value != decided[key]:
            raise UserError(f"extra: {key}={value}, but the model has {key}={decided[key]}")
    for key in ("dtype", "torch_dtype"):
        if extra.get(key, config.param_dtype) != config.param_dtype:
            raise UserError(f"extra: {key}={extra[key]}, but the parameters are {config.param_dtype}")
    # Null where unknown: an absent token id would be read as that of the class's own vocabulary.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    bookkeeping = {"architectures": [ARCHITECTURES[name].class_name], "torch_dtype": config.param_dtype, **tokens}
    document = {**bookkeeping, **extra, **decided}
    try:
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"extra: cannot be written as JSON: {_one_line(error)}") from error
    config_from_json(document, "extra")  # Raises for a key that is not known, or changes the mathematics.
    return text


def _host_leaves(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters by path, on the host, checked against the config."""
    if not isinstance(params, Mapping):
        raise UserError(f"params: must be the parameter tree of the model, not {type(params).__name__}")
    given, shapes = flatten_dict(params, sep="/"), leaf_shapes(config)
    for path in [*shapes, *given]:
        if path not in given:
            raise UserError(f"{path}: not among the parameters, but a model of this config has it")
        if path not in shapes:
            raise UserError(f"{path}: among the parameters, but a model of this config does not have it")
        if given[path].shape != shapes[path]:
            raise UserError(f"{path}: shape {given[path].shape}, but a model of this config has {shapes[path]}")
        if given[path].dtype != jnp.dtype(config.param_dtype):
            raise UserError(f"{path}: dtype {given[path].dtype}, but model.param_dtype={config.param_dtype}")
    leaves = {path: np.asarray(leaf) for path, leaf in given.items()}
    for path, leaf in leaves.items():
        if not _is_finite(leaf):
            raise UserError(f"{path}: holds NaN or Inf")
    return leaves


def _shards(places: Iterable[Place], itemsize: int, limit: int) -> list[list[Place]]:
    """The tensors in order, in groups of at most `limit` bytes or of one tensor."""
    shards: list[list[Place]] = []
    size = limit
    for place in places:
        bytes_ = math.prod(place.shape) * itemsize
        if not shards or size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += bytes_
    return shards


def _write_shards(
    directory: Path, shards: Sequence[Sequence[Place]], leaves: Mapping[str, np.ndarray], dtype: np.dtype
) -> None:
    """The safetensors files, and the index where there are several."""
    count, total, weight_map = len(shards), 0, {}
    for number, shard in enumerate(shards, 1):
        file = directory / (WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors")
        tensors = {}
        for place in shard:
            tensor = tensors[place.name] = np.empty(place.shape, dtype)
            for view, leaf in zip(place.views(tensor), place.targets(leaves), strict=True):
                view[...] = leaf
            total += tensor.nbytes
            weight_map[place.name] = file.name
        _safetensors().numpy.save_file(tensors, file, metadata={"format": "pt"})
        # safetensors makes files that nobody else may read, whatever the umask.
        file.chmod((directory / CONFIG).stat().st_mode)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
