"""A model's parameters as plain safetensors: by the paths of our tree, beside a JSON of the ModelConfig."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from hybridnorm_jax.config_fields import check_choice
from hybridnorm_jax.interop.huggingface import check_free, check_params, whole_directory
from hybridnorm_jax.interop.safetensors_files import split_into_shards, write_shards
from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS
from hybridnorm_jax.interop.tensor_places import LeafSlice, Place, leaf_shapes
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig
from hybridnorm_jax.whole_files import expanded

MODEL_CONFIG = "model_config.json"


def save_parameters(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write model.safetensors, whose tensors are the leaves of our tree, and model_config.json, the ModelConfig.

        config = hn.ModelConfig(**json.loads(Path(path, "model_config.json").read_text()))
        params = unflatten_dict(safetensors.numpy.load_file(f"{path}/model.safetensors"), sep="/")

    A name is the path of a leaf, such as run_0/attention/query/kernel (docs/parameters.md). The directory appears whole
    or not at all.

    Args:
      path: directory to write; it must not exist or be empty.
      params: of `Decoder(config)`, jax or NumPy arrays of config.param_dtype.
      dtype: of the tensors; by default config.param_dtype.
      files: further files by name.
      max_shard_bytes: a larger model is written as several files, with an index.

    Raises:
      UserError: the parameters are not of this config or not finite; the path is taken.
    """
    path = Path(expanded(path)).absolute()
    check_free(path)
    check_params(config, params)
    if dtype is not None:
        check_choice("dtype", dtype, PARAM_DTYPES)
    written = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    numpy_dtype = jnp.dtype(written.param_dtype)
    shards = split_into_shards(_places(config), numpy_dtype.itemsize, max_shard_bytes)
    with whole_directory(path) as directory:
        (directory / MODEL_CONFIG).write_text(json.dumps(dataclasses.asdict(written), indent=2) + "\n")
        for file, content in (files or {}).items():
            (directory / file).write_bytes(content)
        write_shards(directory, shards, flatten_dict(params, sep="/"), numpy_dtype)


def _places(config: ModelConfig) -> Iterator[Place]:
    """Every leaf, as it is."""
    for leaf, shape in leaf_shapes(config).items():
        yield Place(name=leaf, slices=(LeafSlice(leaf, (), shape),), layout=AS_IT_IS)
