"""The README.md of an exported encoder: what it is, what it reads, how it is loaded."""

from hybridnorm_jax.commands.model_card import OWN_CODE, PARAMETERS, count, plain
from hybridnorm_jax.interop.architectures import ALL
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

An encoder that was written by hybridnorm_jax: {parameters:,} parameters,
{layers} layers of width {width}, written as {dtype}.

## Where it normalizes

```text
{scheme}
```

The norms of the blocks are {norm}.

## Load it

{loading}
"""
LOADING = """```python
from transformers import {auto}

model = {auto}.from_pretrained(DIRECTORY{trust})
{use}
```

{inputs}

{which}"""
PIXELS = """`pixel_values` has the shape (batch, {channels}, {height}, {width}). The image processor of the model that
this one was made of says how pixels are scaled."""
TOKENS = "`input_ids` has the shape (batch, tokens). The tokenizer is that of the model that this one was made of."


def auto_class(config: EncoderConfig) -> str:
    """Which of transformers' Auto classes loads it."""
    if config.num_classes is None:
        return "AutoModel"
    return "AutoModelForImageClassification" if config.reads_pixels else "AutoModelForSequenceClassification"


def encoder_card(config: EncoderConfig, *, name: str, kind: str, dtype: str, license_name: str) -> str:
    """The text.

    Args:
      name: of the model.
      kind: a model_type of transformers or of our own code, or "safetensors".
      dtype: of the weights.
      license_name: an identifier.
    """
    tasks = {"AutoModel": "image-feature-extraction" if config.reads_pixels else "feature-extraction"}
    tasks["AutoModelForImageClassification"] = "image-classification"
    tasks["AutoModelForSequenceClassification"] = "text-classification"
    return CARD.format(
        license=license_name,
        library="hybridnorm_jax" if kind == "safetensors" else "transformers",
        task=tasks[auto_class(config)],
        name=plain(name),
        parameters=count(config),
        layers=config.num_layers,
        width=config.d_model,
        dtype=dtype,
        scheme=config.scheme_rule.table(config.num_layers).replace("```", "'''"),
        norm=config.norm,
        loading=_loading(config, kind),
    )


def _loading(config: EncoderConfig, kind: str) -> str:
    if kind == "safetensors":
        return PARAMETERS.format(module="Encoder", config="EncoderConfig", outputs="outputs", inputs="inputs")
    is_own = bool(ALL[kind].code_files)
    given = "pixel_values=pixels" if config.reads_pixels else "input_ids=tokens"
    called = f"model({given})"
    height, width = config.image_size
    pixels = PIXELS.format(channels=config.num_channels, height=height, width=width)
    features = f"outputs = {called}  # last_hidden_state and, where something is pooled, pooler_output"
    return LOADING.format(
        auto=auto_class(config),
        trust=", trust_remote_code=True" if is_own else "",
        use=features if config.num_classes is None else f"logits = {called}.logits",
        inputs=pixels if config.reads_pixels else TOKENS,
        which=OWN_CODE if is_own else f"It is a `{ALL[kind].class_name}` of transformers.",
    )
