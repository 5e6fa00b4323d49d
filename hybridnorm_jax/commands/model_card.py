"""The README.md of an exported model, as far as it is that of a decoder and of an encoder alike.

What else it says of a decoder is in decoder_card.py, of an encoder in encoder_card.py.
"""

import dataclasses

from hybridnorm_jax.interop.architectures import ALL
from hybridnorm_jax.interop.tensor_places import leaf_shapes
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig

CARD = """---
license: {license}
library_name: {library}
pipeline_tag: {task}
tags:
- hybridnorm_jax
- norm-placement
---

# {name}

{what} hybridnorm_jax: {parameters:,} parameters,
{layers} layers of width {width}{experts}, written as {dtype}.

## Where it normalizes

```text
{scheme}
```

The norms of the blocks are {norm}.

## Load it

{loading}
"""
LOADING = """```python
from transformers import {classes}

model = {auto}.from_pretrained(DIRECTORY{trust})
{use}
```

{inputs}{which}"""
OWN_CODE = """transformers has no architecture with these placements: the directory holds the PyTorch code of the model.
Its files end in `_hybridnorm.py`, and `trust_remote_code=True` lets transformers run them. It needs torch and
transformers 5."""
PARAMETERS = """The tensors of `model.safetensors` are the parameters of `hybridnorm_jax.{module}` by their paths:

```python
import json, pathlib
import hybridnorm_jax as hn
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

config = hn.{config}(**json.loads(pathlib.Path(DIRECTORY, "model_config.json").read_text()))
params = unflatten_dict(load_file(f"{{DIRECTORY}}/model.safetensors"), sep="/")
outputs = hn.{module}(config).apply({{"params": params}}, inputs)
```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What the text says besides the model's configuration.

    Attributes:
      name: of the model.
      kind: a model_type of transformers or of our own code, or "safetensors".
      dtype: of the weights.
      license_name: an identifier.
    """

    name: str
    kind: str
    dtype: str
    license_name: str

    @property
    def trust(self) -> str:
        """What calls of transformers have besides, where our code is beside the weights."""
        return ", trust_remote_code=True" if self._is_own_code else ""

    def text(self, model: ModelConfig, *, task: str, what: str, loading: str) -> str:
        """The text, up to how the model is loaded.

        Args:
          model: its configuration.
          task: one of the Hub's pipeline tags.
          what: the model is and was done with it by us, the beginning of a sentence.
          loading: by `loaded_by`.
        """
        experts = f", {model.experts_per_token} of {model.num_experts} experts a token" if model.num_experts else ""
        return CARD.format(
            license=self.license_name,
            library="hybridnorm_jax" if self.kind == "safetensors" else "transformers",
            task=task,
            name=plain(self.name),
            what=what,
            parameters=_count(model),
            layers=model.num_layers,
            width=model.d_model,
            experts=experts,
            dtype=self.dtype,
            scheme=model.scheme_rule.table(model.num_layers).replace("```", "'''"),
            norm=model.norm,
            loading=loading,
        )

    def loaded_by(self, model: ModelConfig, auto: str, *others: str, use: str, inputs: str = "") -> str:
        """How the model is loaded.

        Args:
          model: its configuration.
          auto: the class of transformers that loads it.
          others: classes that `use` needs.
          use: lines of Python.
          inputs: what goes in, in words.
        """
        if self.kind == "safetensors":
            module = "Encoder" if isinstance(model, EncoderConfig) else "Decoder"
            return PARAMETERS.format(module=module, config=type(model).__name__)
        which = OWN_CODE if self._is_own_code else f"It is a `{ALL[self.kind].class_name}` of transformers."
        classes, paragraph = ", ".join((auto, *others)), f"{inputs}\n\n" if inputs else ""
        return LOADING.format(auto=auto, classes=classes, trust=self.trust, use=use, inputs=paragraph, which=which)

    @property
    def _is_own_code(self) -> bool:
        return self.kind in ALL and bool(ALL[self.kind].code_files)


def plain(text: str) -> str:
    """A text of the configuration, which Markdown shall show as it is."""
    return "".join(character if character.isalnum() or character in " -_./*" else " " for character in text)


def _count(model: ModelConfig) -> int:
    """How many parameters it has."""
    import numpy as np

    return sum(int(np.prod(shape, dtype=np.int64)) for shape in leaf_shapes(model).values())
