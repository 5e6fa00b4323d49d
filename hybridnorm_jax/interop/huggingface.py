"""Hugging Face checkpoints in and out: a directory of config.json and safetensors files.

No torch is needed and no pickle is read. What config.json means stands in architectures.py, where every tensor
belongs in tensors.py; here the directory is read and written.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hybridnorm_jax.config import PARAM_DTYPES, ModelConfig, UserError, check_choice
from hybridnorm_jax.interop.architectures import ARCHITECTURES, architecture_of, config_from_json, config_to_json
from hybridnorm_jax.interop.tensors import TABLES, Place, TensorTable, leaf_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load_huggingface(
    path: str | Path, *, dtype: str | None = None, ignore_keys: Sequence[str] = ()
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a Hugging Face directory: `Decoder(config).apply({"params": params}, tokens)` gives its logits.

    Architectures: GPT-2, GPT-NeoX (sequential and parallel residual), OPT (with norms before the sublayers), Llama,
    Qwen3, OLMo 2. Tensors are read one at a time into the stacked leaves: beyond the parameters themselves, host
    memory is needed for one tensor, or for two while a tied model's own copy of the head is compared.

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
        raise UserError(f"{directory}: no such directory")
    file = directory / CONFIG
    name, config = config_from_json(_read_json(file), str(file), ignore_keys)
    table = TABLES[name]
    places = list(table.places(config))
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(directory, table, stack)
        stored = tensors.check(places)
        if config.tie_embeddings:
            _check_tied_head(tensors, table, places[0])
        params = _read_params(tensors, places, leaf_shapes(config), jnp.dtype(dtype or stored))
    return dataclasses.replace(config, param_dtype=dtype or stored), params


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        directory = Path(scratch) / "checkpoint"
        directory.mkdir()
        (directory / CONFIG).write_text(text)
        _write_shards(directory, shards, leaves, jnp.dtype(config.param_dtype))
        directory.replace(path)


# ---- Reading


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Tensors:
    """The tensors of a directory by name, prefix included, without the buffers; their data is read on demand."""

    def __init__(self, directory: Path, table: TensorTable, stack: contextlib.ExitStack):
        self.found: dict[str, tuple[Path, str, Any]] = {}  # name -> file, name in the file, the open file
        names = {place.name for place in ()}
        for file, expected in _files(directory).items():
            handle = _open(file, stack)
            stored = set(handle.keys())
            for name in expected or ():
                if name not in stored:
                    raise UserError(f"{name}: {INDEX} names it in {file}, which does not hold it")
            for raw in handle.keys():
                if expected is not None and raw not in expected:
                    raise UserError(f"{raw}: in {file}, but {INDEX} does not name it there")
                self._enter(raw, file, handle, table)
        del names

    def _enter(self, raw: str, file: Path, handle: Any, table: TensorTable) -> None:
        bare = raw.removeprefix(table.prefix)
        if re.fullmatch(table.buffers, bare):
            return
        name = raw if raw == table.head else table.prefix + bare
        if name in self.found:
            raise UserError(f"{name}: in {self.found[name][0]} and again in {file}")
        self.found[name] = file, raw, handle
