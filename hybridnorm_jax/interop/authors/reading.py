"""What reads the checkpoints of PROJECTS: arrays by name, or safetensors files of them."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hybridnorm_jax.config_fields import check_choice, shortened
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.interop.authors.projects import PROJECTS, Project
from hybridnorm_jax.interop.named_arrays import NamedArrays
from hybridnorm_jax.interop.safetensors_files import StoredArrays, is_finite, same_bits
from hybridnorm_jax.interop.tensor_places import Place, leaf_shapes
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig, check_is_config
from hybridnorm_jax.whole_files import expanded


def load_authors(
    project: str, path: str | Path, config: ModelConfig, *, dtype: str | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of safetensors files of a project in PROJECTS: `Decoder(config).apply({"params": params}, tokens)`.

    Tensors are read one at a time into the stacked leaves. docs/authors.md says how torch's own files become
    safetensors; no pickle is read.

    Args:
      project: its name.
      path: a .safetensors file, or a directory with model.safetensors, or shards and model.safetensors.index.json.
      config: of the model, such as `PROJECTS[project].config(...)` with the scheme and the sizes of the checkpoint.
      dtype: of the parameters (float64, float32, bfloat16, float16); by default as stored.

    Returns:
      config: its param_dtype is that of the parameters.
      params: the tree of docs/parameters.md, NumPy arrays.

    Raises:
      UserError: as params_from_authors; or a file is missing, damaged or a pickle.
    """
    known = _project(project)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"path={path!r:.80}: must be the path of safetensors files")
    with contextlib.ExitStack() as stack:
        arrays = StoredArrays(Path(expanded(path)), stack)
        reader = _Reader(known, config, arrays, dtype, source=str(path))
        params = reader.params()
    return dataclasses.replace(config, param_dtype=reader.dtype.name), params


def params_from_authors(
    project: str, config: ModelConfig, arrays: Mapping[str, np.ndarray], *, dtype: str | None = None
) -> dict[str, Any]:
    """The parameters of `Decoder(config)` from a checkpoint of a project in PROJECTS.

    The names say where norms stand, and nothing of factors: the tensors of `pre` are those of `layernorm_scaling`.
    `config` must be that of the model that was trained.

    Args:
      project: its name.
      config: of the model, such as `PROJECTS[project].config(...)` with the scheme and the sizes of the checkpoint.
      arrays: parameter name -> array in PyTorch's layout, with or without the prefixes of the project; also torch's
        tensors on a CPU, of dtypes that NumPy has.
      dtype: of the parameters (float64, float32, bfloat16, float16); by default that of the arrays.

    Returns:
      The tree of docs/parameters.md, NumPy arrays.

    Raises:
      UserError: no such project; an array is missing, left over, of another shape or not of floats, or holds NaN or
        Inf; arrays are of several dtypes and none is asked for; a tied model's own copy of the head is another matrix.
    """
    return _Reader(_project(project), config, arrays, dtype, source="the checkpoint").params()


def _project(name: str) -> Project:
    if not isinstance(name, str) or name not in PROJECTS:
        raise UserError(f"project={shortened(name)}: not known{did_you_mean(name, PROJECTS)}")
    return PROJECTS[name]


class _Reader:
    """Reads one checkpoint.

    Attributes:
      dtype: of the parameters, once the first array was read.
    """

    dtype: np.dtype

    def __init__(
        self,
        project: Project,
        config: ModelConfig,
        arrays: Mapping[str, np.ndarray],
        dtype: str | None,
        *,
        source: str,
    ):
        check_is_config(config)
        if dtype is not None:
            check_choice("dtype", dtype, PARAM_DTYPES)
        self._asked, self._found = dtype, ""
        self._table = project.tensors
        self._config = config
        self._arrays = NamedArrays(arrays, names_of=project.own_names, source=source)

    def params(self) -> dict[str, Any]:
        """Every tensor, one at a time, into the leaves that it holds."""
        shapes = leaf_shapes(self._config)
        leaves: dict[str, np.ndarray] = {}
        for place in self._table.places(self._config):
            array = self._take(place.name, place.shape)
            for piece in place.slices:
                if piece.path not in leaves:
                    leaves[piece.path] = np.empty(shapes[piece.path], self.dtype)
            targets = place.targets(leaves)
            with np.errstate(over="ignore"):  # What does not fit the dtype becomes Inf, which is looked for next.
                place.read(array, targets)
            if not all(map(is_finite, targets)):
                raise UserError(f"{place.name}: holds NaN or Inf, read as {self.dtype.name}")
            if self._config.tie_embeddings and place.slices[0].path == "token_embedding/embedding":
                self._check_tied_head(place, array)
        self._arrays.check_all_read(except_for=self._table.is_buffer)
        return unflatten_dict(leaves, sep="/")

    def _take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == self._table.head and name not in self._arrays:
            right = "a head that is the embedding is model.tie_embeddings=true"
            raise UserError(f"{name}: not in {self._arrays.source}, but the configuration asks for it; {right}")
        array = self._arrays.take(name, *shape)
        found = array.dtype.name
        self._found = self._found or found
        if self._asked is None and found != self._found:
            right = "pass dtype=, such as dtype='float32'"
            raise UserError(f"{name}: dtype {found} in {self._arrays.source}, but others are {self._found}; {right}")
        if found not in PARAM_DTYPES:
            raise UserError(f"{name}: dtype {found} in {self._arrays.source} must be one of {', '.join(PARAM_DTYPES)}")
        self.dtype = jnp.dtype(self._asked or found)
        return array

    def _check_tied_head(self, embedding: Place, tied: np.ndarray) -> None:
        """A tied model's checkpoint may hold the head as well, if it is the embedding, bit for bit."""
        head = self._table.head
        if head in self._arrays and not same_bits(self._arrays.take(head, *embedding.shape), tied):
            raise UserError(f"{head}: is not {embedding.name}, but the configuration has tie_embeddings=True")
