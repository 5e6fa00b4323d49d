"""Hugging Face checkpoints in and out: a directory of config.json and safetensors files.

No torch is needed and no pickle is read. What config.json means and where every tensor belongs is in architectures/,
which files may be opened in checkpoint_files.py, how weights are read and written in safetensors_files.py, and how they
are put on the devices of a mesh in placed_params.py.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hybridnorm_jax.config_fields import check_choice, shortened
from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.interop.architectures import ALL, check_class, config_from_json, config_to_json
from hybridnorm_jax.interop.checkpoint_files import read_json
from hybridnorm_jax.interop.placed_params import placed_params, read_place
from hybridnorm_jax.interop.safetensors_files import (
    CONFIG,
    INDEX,
    SUFFIX,
    StoredTensors,
    same_bits,
    split_into_shards,
    write_shards,
)
from hybridnorm_jax.interop.tensor_places import Place, TensorTable, leaf_shapes
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig, check_is_config
from hybridnorm_jax.whole_files import expanded

# Our PyTorch code, which is copied beside the weights.
CODE = Path(__file__).with_name("pytorch")


def load_huggingface(
    path: str | Path, *, dtype: str | None = None, ignore_keys: Sequence[str] = (), shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a Hugging Face directory: `build_model(config).apply({"params": params}, inputs)` gives its logits.

    Which architectures are read, docs/architectures.md lists; besides them what save_huggingface writes with code of
    ours. No code in the directory is executed. Tensors are read one at a time into the stacked leaves: beyond the
    parameters themselves, host memory is needed for one tensor, or for two while a tied model's own copy of the head is
    compared.

    Args:
      path: directory with config.json and model.safetensors, or shards and model.safetensors.index.json.
      dtype: of the parameters (float64, float32, bfloat16, float16), converted while reading; by default as stored.
      ignore_keys: keys of config.json to read as if they were absent.
      shardings: where the parameters shall be: a jax Sharding for all, or a tree of them like the parameters'. They are
        jax arrays then, and the host holds one layer at a time. All processes of a run must call this together.

    Returns:
      config: its param_dtype is that of the parameters, its compute dtype float32, the nearest to what the authors
        published; `dataclasses.replace(config, dtype="bfloat16")` for another. Dropout is 0 and the initializer our
        default: neither is taken over.
      params: the tree described in model/decoder.py, NumPy arrays, or jax arrays where `shardings` says.

    Raises:
      UserError: the directory, config.json or a tensor is missing, damaged or not understood; a tensor is left over,
        of another shape than config.json says, not floating-point, or holds NaN or Inf.
    """
    if dtype is not None:
        check_choice("dtype", dtype, PARAM_DTYPES)
    directory = _directory(path)
    name, config = _name_and_config(directory, ignore_keys)
    table = ALL[name].tensors
    with contextlib.ExitStack() as stack:
        tensors = StoredTensors(directory, table, stack)
        # A tied model's file may hold the head as well.
        found = tensors.check(table.places(config), beside=[table.head] if config.tie_embeddings else [])
        dtype = dtype or _stored_dtype(found.dtypes, directory)
        if config.tie_embeddings:
            _check_tied_head(tensors, table, embedding=found.places[0])
        shapes = leaf_shapes(config)
        if shardings is None:
            params = _read_params(tensors, found.places, shapes, jnp.dtype(dtype))
        else:
            params = placed_params(tensors, found.places, shapes, jnp.dtype(dtype), shardings)
    return dataclasses.replace(config, param_dtype=dtype), params


def huggingface_config(path: str | Path, *, ignore_keys: Sequence[str] = ()) -> ModelConfig:
    """The model of a Hugging Face directory, in float32; no tensor is read.

    Raises:
      UserError: as load_huggingface.
    """
    return _name_and_config(_directory(path), ignore_keys)[1]


def _directory(path: str | Path) -> Path:
    """The directory of a checkpoint that a caller names."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"path={path!r:.80}: must be the path of a directory with a {CONFIG}")
    return Path(expanded(path))


def _name_and_config(directory: Path, ignore_keys: Sequence[str]) -> tuple[str, ModelConfig]:
    """The architecture's name and the model of a directory."""
    if not directory.is_dir():
        wrong = "not a directory" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {wrong}")
    _check_no_adapter(directory)
    # In a text every part of it would be looked for.
    if isinstance(ignore_keys, str) or not isinstance(ignore_keys, Collection):
        raise UserError(f"ignore_keys={ignore_keys!r:.80}: must be a list of keys, such as ['KEY']")
    document = read_json(directory, CONFIG)
    # With a wrong model_type every key would be wrong: the class is looked at first.
    if "architectures" not in ignore_keys:
        check_class(document, str(directory / CONFIG))
    return config_from_json(document, str(directory / CONFIG), ignore_keys)


def save_huggingface(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a Hugging Face directory that transformers loads; `load_huggingface` gives the same bits back.

    Where an architecture of transformers expresses the model exactly, that is written. Everywhere else the directory
    holds PyTorch code of ours (pytorch/), and transformers loads it with trust_remote_code=True.

    The directory appears whole or not at all. One tensor at a time is copied in memory.

    Args:
      path: directory to write; it must not exist or be empty.
      config: of the model.
      params: of `build_model(config)`, jax or NumPy arrays of config.param_dtype.
      architecture: model_type to write, "hybridnorm" for our own code, that of encoders too; by default the first that
        expresses the model.
      dtype: of the tensors (float64, float32, bfloat16, float16); by default config.param_dtype.
      extra: further keys of config.json, such as bos_token_id, or max_position_embeddings of a model with rope.
      files: further files by name, such as a tokenizer.json.
      max_shard_bytes: a larger model is written as several files.

    Raises:
      UserError: the named architecture does not express the model exactly (the message says what is in the way); the
        parameters are not of this config or not finite; `extra` contradicts the model or is not known for the
        architecture; a file of `files` is one of the model's own; the path is taken.
    """
    path = Path(expanded(path)).absolute()
    check_is_config(config)
    check_free(path)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    if dtype is not None:
        check_choice("dtype", dtype, PARAM_DTYPES)
    check_params(config, params)
    name, decided = config_to_json(config, architecture)
    written = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    contents = {CONFIG: _config_text(name, decided, written, extra or {}).encode()}
    contents |= {file: (CODE / file).read_bytes() for file in ALL[name].code_files}
    _check_files(files or {}, ours=contents)
    contents |= files or {}
    numpy_dtype = jnp.dtype(written.param_dtype)
    shards = split_into_shards(ALL[name].tensors.places(config), numpy_dtype.itemsize, max_shard_bytes)
    with whole_directory(path) as directory:
        for file, content in contents.items():
            (directory / file).write_bytes(content)
        write_shards(directory, shards, flatten_dict(params, sep="/"), numpy_dtype)


def _check_files(files: Mapping[str, bytes], *, ours: Collection[str]) -> None:
    """Raise UserError unless these are further files: beside those of the model, and in its directory."""
    for name, content in files.items():
        if not name or Path(name).name != name or name in ours or name == INDEX or name.endswith(SUFFIX):
            right = "must be the plain name of a file that does not belong to the model itself"
            raise UserError(f"files: {shortened(name)}: {right}")
        if not isinstance(content, bytes):
            raise UserError(f"files: {shortened(name)}: must be bytes, not {type(content).__name__}")


def _check_no_adapter(directory: Path) -> None:
    """Raise UserError for a directory that holds an adapter: a change of a model that is elsewhere."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).exists():
            right = "merge it into its model (PEFT's merge_and_unload) and read that"
            raise UserError(f"{directory / name}: an adapter, not a whole model; {right}")


def check_free(path: Path) -> None:
    """Raise UserError unless a directory can be made at this path: nothing is there, or an empty directory."""
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already; name a new directory")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which is renamed to `path` at the end; after an error nothing is left."""
    new = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be made, {path.parent} cannot be written to")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            directory = Path(scratch) / "checkpoint"
            directory.mkdir()
            yield directory
            directory.replace(path)
    except BaseException:
        for parent in new:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


def _stored_dtype(dtypes: set[str], directory: Path) -> str:
    if len(dtypes) > 1:
        found = ", ".join(sorted(dtypes))
        raise UserError(f"{directory}: tensors of several dtypes ({found}); pass dtype=, such as dtype='float32'")
    return next(iter(dtypes))


def _check_tied_head(tensors: StoredTensors, table: TensorTable, embedding: Place) -> None:
    """A tied model's file may hold the head as well, if it is the embedding, bit for bit."""
    if table.head not in tensors:
        return
    tensors.check_tensor(table.head, embedding.shape)
    head, tied = tensors.read(table.head), tensors.read(embedding.name)
    if not same_bits(head, tied):
        raise UserError(f"{tensors.where(table.head)}: is not {embedding.name}, but {CONFIG} says tie_word_embeddings")


def _read_params(
    tensors: StoredTensors, places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> dict[str, Any]:
    """Every tensor, one at a time, into the leaves it holds."""
    leaves = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for place in places:
        read_place(tensors, place, place.targets(leaves))
    return unflatten_dict(leaves, sep="/")


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
    bookkeeping = {"architectures": [ALL[name].class_name], "torch_dtype": config.param_dtype, **tokens}
    document = {**bookkeeping, **extra, **decided}
    try:
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"extra: cannot be written as JSON: {first_line(error)}") from error
    config_from_json(document, "extra")  # Raises for a key that is not known, or changes the mathematics.
    return text


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Raise UserError unless these are parameters of `Decoder(config)`, by their paths, shapes and dtype."""
    if not isinstance(params, Mapping):
        raise UserError(f"params: must be the parameter tree of the model, not {type(params).__name__}")
    given, shapes = flatten_dict(params, sep="/"), leaf_shapes(config)
    for path in (*shapes, *given):
        if path not in given:
            raise UserError(f"{path}: not among the parameters, but a model of this config has it")
        if path not in shapes:
            raise UserError(f"{path}: among the parameters, but a model of this config does not have it")
        if given[path].shape != shapes[path]:
            raise UserError(f"{path}: shape {given[path].shape}, but a model of this config has {shapes[path]}")
        if given[path].dtype != jnp.dtype(config.param_dtype):
            raise UserError(f"{path}: dtype {given[path].dtype}, but model.param_dtype={config.param_dtype}")
