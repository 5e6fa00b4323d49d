"""PROJECTS, the table of authors' projects whose checkpoints are read; reading.py reads them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnorm_jax.interop.authors.dyt_llama import DYT_LLAMA
from hybridnorm_jax.interop.authors.encoder_decoder import B2T, FAIRSEQ, TORCHSCALE
from hybridnorm_jax.interop.authors.llama_forks import LLAMA_FORKS
from hybridnorm_jax.interop.authors.nanogpt import NANOGPT
from hybridnorm_jax.interop.authors.ngpt import NGPT
from hybridnorm_jax.interop.authors.siamese import SIAMESE
from hybridnorm_jax.interop.authors.simplegpt import SIMPLEGPT
from hybridnorm_jax.interop.tensor_places import TensorTable
from hybridnorm_jax.model.config import ModelConfig

# What torch puts before all names of a model that it wraps: DataParallel and its like, and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Project:
    """A project whose checkpoints are read.

    Attributes:
      source: paper and code.
      tensors: the names of its tensors, and which leaves of ours each holds.
      keys: of ModelConfig, which all of its models have.
      prefixes: may stand before all names of a checkpoint, in any order.
      scales_embedding: whether its token embedding is times the root of its width, unless its models ask otherwise.
    """

    source: str
    tensors: TensorTable
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = _WRAPPERS
    scales_embedding: bool = False

    def config(self, **keys: Any) -> ModelConfig:
        """The ModelConfig of one of its models.

        Args:
          keys: of ModelConfig: the scheme and the sizes, and what differs from what all of its models have.
        """
        config = ModelConfig(**{**self.keys, **keys})
        if self.scales_embedding and "embedding_scale" not in keys:
            return dataclasses.replace(config, embedding_scale=math.sqrt(config.d_model))
        return config

    def own_names(self, names: Sequence[str]) -> Sequence[str]:
        """These names of a checkpoint as `tensors` has them: without the prefixes that all of them have."""
        while shared := next((prefix for prefix in self.prefixes if _all_begin(names, prefix)), None):
            names = [name.removeprefix(shared) for name in names]
        return names


def _all_begin(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


_DYT = {"scheme": "pre", "learned_embedding_scale": True}
_NANOGPT_KEYS = {
    **_DYT,
    **{"norm_bias": True, "attention_bias": True, "mlp_bias": True, "activation": "gelu"},
    **{"positions": "learned", "tie_embeddings": True},
}
_FAIRSEQ_PREFIXES = (*_WRAPPERS, "decoder.")
# Their padding has a row of its own before the positions.
_LAYERNORM = {
    **{"norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    **{"positions": "learned", "position_offset": 2},
}
PROJECTS: dict[str, Project] = {
    "torchscale": Project(
        source="Sub-LN (2210.06423) and DeepNorm (2203.00555), github.com/microsoft/torchscale, its decoder",
        tensors=TORCHSCALE,
        keys={**_LAYERNORM, "activation": "gelu"},
        prefixes=_FAIRSEQ_PREFIXES,
    ),
    "fairseq": Project(
        source="NormFormer (2110.09456), facebookresearch/fairseq; ResiDual (2304.14802), microsoft/ResiDual",
        tensors=FAIRSEQ,
        keys=_LAYERNORM,
        prefixes=_FAIRSEQ_PREFIXES,
        scales_embedding=True,
    ),
    "b2t": Project(
        source="B2T (2206.00330), github.com/takase/b2t_connection, over fairseq: its decoder",
        tensors=B2T,
        keys={**_LAYERNORM, "activation": "relu"},
        prefixes=_FAIRSEQ_PREFIXES,
        scales_embedding=True,
    ),
    "mix_ln": Project(
        source="Mix-LN (2412.13795), github.com/pixeli99/MixLN",
        tensors=LLAMA_FORKS,
    ),
    "layernorm_scaling": Project(
        source="LayerNorm-Scaling (2502.05795), github.com/lmsdss/LayerNorm-Scaling",
        tensors=LLAMA_FORKS,
    ),
    "prores": Project(
        source="ProRes (2603.05369), github.com/dandingsky/ProRes",
        tensors=LLAMA_FORKS,
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
