"""PROJECTS, the table of authors' projects whose checkpoints are read, and what reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.interop.authors.dyt_llama import DYT_LLAMA
from hybridnorm_jax.interop.authors.encoder_decoder import FAIRSEQ, TORCHSCALE
from hybridnorm_jax.interop.authors.nanogpt import NANOGPT
from hybridnorm_jax.interop.authors.ngpt import NGPT
from hybridnorm_jax.interop.authors.siamese import SIAMESE
from hybridnorm_jax.interop.authors.simplegpt import SIMPLEGPT
from hybridnorm_jax.interop.tensor_places import TensorTable, leaf_shapes
from hybridnorm_jax.model.config import ModelConfig

_DYT = {"scheme": "pre", "learned_embedding_scale": True}


@dataclasses.dataclass(frozen=True)
class Project:
    """A project whose checkpoints are read.

    Attributes:
      source: paper and code.
      tensors: the names of its tensors, and which leaves of ours each holds.
      keys: of ModelConfig, which all of its models have.
    """

    source: str
    tensors: TensorTable
    keys: Mapping[str, Any]


_NANOGPT_KEYS = {
    **_DYT,
    **{"norm_bias": True, "attention_bias": True, "mlp_bias": True, "activation": "gelu"},
    **{"positions": "learned", "tie_embeddings": True},
}
# Their padding has a row of its own before the positions. fairseq multiplies the embedding by the root of its width:
# model.embedding_scale, which depends on it.
_LAYERNORM = {
    **{"norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    **{"positions": "learned", "position_offset": 2},
}
PROJECTS: dict[str, Project] = {
    "torchscale": Project(
        source="Sub-LN (2210.06423) and DeepNorm (2203.00555), github.com/microsoft/torchscale, its decoder",
        tensors=TORCHSCALE,
        keys={**_LAYERNORM, "activation": "gelu"},
    ),
    "fairseq": Project(
        source="NormFormer (2110.09456), facebookresearch/fairseq; ResiDual (2304.14802), microsoft/ResiDual",
        tensors=FAIRSEQ,
        keys=_LAYERNORM,
    ),
    "simplegpt": Project(
        source="SimpleNorm (2602.01212), github.com/Ocram7/SimpleGPT",
        tensors=SIMPLEGPT,
        keys={"scheme": "simple_norm"},
    ),
    "ngpt": Project(
        source="nGPT (2410.01131), github.com/NVIDIA/ngpt, with the rotation that it names and does not compute",
        tensors=NGPT,
        keys={"scheme": "ngpt"},
    ),
    "siamese": Project(
        source="SiameseNorm (2602.08064), github.com/Qwen-Applications/SiameseNorm, its language model",
        tensors=SIAMESE,
        keys={"rope_theta": 500000.0},
    ),
    "dyt_llama": Project(
        source="DyT (2503.10622), github.com/jiachenzhu/DyT, other_tasks/LLaMA",
        tensors=DYT_LLAMA,
        keys={**_DYT, "norm": "dyt"},
    ),
    "dyt_nanogpt": Project(
        source="Derf (2512.10938), github.com/zlab-princeton/Derf, its nanoGPT with DyT",
        tensors=NANOGPT,
        keys={**_NANOGPT_KEYS, "norm": "dyt"},
    ),
    "derf_nanogpt": Project(
        source="Derf (2512.10938), github.com/zlab-princeton/Derf, its nanoGPT",
        tensors=NANOGPT,
        keys={**_NANOGPT_KEYS, "norm": "derf"},
    ),
}


def params_from_authors(project: str, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of `Decoder(config)` from a checkpoint of a project in PROJECTS.

    Args:
      project: its name.
      config: of the model; `ModelConfig(**PROJECTS[project].keys, ...)` with the sizes of the checkpoint.
      arrays: parameter name -> array in PyTorch's layout.

    Returns:
      The tree of docs/parameters.md, in the dtype of the arrays.

    Raises:
      UserError: no such project; an array is missing, left over, not of floats or of another shape.
    """
    if project not in PROJECTS:
        raise UserError(f"project={shortened(project)}: not known{did_you_mean(project, PROJECTS)}")
    table = PROJECTS[project].tensors
    shapes = leaf_shapes(config)
    leaves: dict[str, np.ndarray] = {}
    read = {table.head} if config.tie_embeddings else set()
    for place in table.places(config):
        array = _array(arrays, place.name, place.shape)
        for piece in place.slices:
            leaves.setdefault(piece.path, np.empty(shapes[piece.path], array.dtype))
        place.read(array, place.targets(leaves))
        read.add(place.name)
    for name in arrays:
        if name not in read and not table.is_buffer(name):
            right = "in the checkpoint, but a model of this configuration has no place for it"
            raise UserError(f"{shortened(name)}: {right}")
    return unflatten_dict(leaves, sep="/")


def _array(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"{name}: not in the checkpoint, but the configuration asks for it")
    array = np.asarray(arrays[name])
    if array.shape != shape:
        raise UserError(f"{name}: shape {array.shape} in the checkpoint, {shape} by the configuration")
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{name}: dtype {array.dtype} in the checkpoint, but parameters are floats")
    return array
