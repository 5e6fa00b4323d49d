"""The README.md of an exported model: what it is, what it was trained on, how good it is, how it is loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

from hybridnorm_jax.config.run_config import DataSection, RunConfig
from hybridnorm_jax.interop.architectures import ALL
from hybridnorm_jax.interop.tensor_places import leaf_shapes
from hybridnorm_jax.model.config import ModelConfig

MOST_FILES = 20
CARD = """---
license: {license}
library_name: {library}
pipeline_tag: text-generation
tags:
- hybridnorm_jax
- norm-placement
---

# {name}

A decoder that was {made} hybridnorm_jax: {parameters:,} parameters,
{layers} layers of width {width}{experts}, written as {dtype}.

## Where it normalizes

```text
{scheme}
```

The norms are {norm}.

## Load it

{loading}

## Training

{training}
"""
TRAINING = """{lines}

`training_config.yaml` is the whole configuration. The run is repeated with

```bash
hybridnorm train training_config.yaml
```

Data:

{data}"""
UNKNOWN_TRAINING = """The checkpoint of step {step:,} has no record of its training, like all that were converted from
weights alone or saved from Python."""
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY{trust})
{use}
```

{which}"""
WITH_TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})
text = tokenizer.bos_token + "def "  # a document begins with this token
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"""
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
{outputs} = hn.{module}(config).apply({{"params": params}}, {inputs})
```"""


def model_card(source: Any, *, kind: str, dtype: str, license_name: str) -> str:
    """The text.

    Args:
      source: commands.export.Source.
      kind: a model_type of transformers, "hybridnorm" for our own code, or "safetensors".
      dtype: of the weights.
      license_name: an identifier.
    """
    config, model, records = source.config, source.config.model, _records(source)
    is_trained = bool(source.trained_on or records)
    experts = f", {model.experts_per_token} of {model.num_experts} experts a token" if model.num_experts else ""
    return CARD.format(
        license=license_name,
        library="hybridnorm_jax" if kind == "safetensors" else "transformers",
        name=plain(config.run.name),
        parameters=count(model),
        layers=model.num_layers,
        width=model.d_model,
        experts=experts,
        dtype=dtype,
        scheme=model.scheme_rule.table(model.num_layers).replace("```", "'''"),
        norm=model.norm,
        loading=_loading(kind, has_tokenizer=source.tokenizer is not None),
        made="trained with" if is_trained else "written by",
        training=_training(source, records) if is_trained else UNKNOWN_TRAINING.format(step=source.step),
    )


def plain(text: str) -> str:
    """A text of the configuration, which Markdown shall show as it is."""
    return "".join(character if character.isalnum() or character in " -_./*" else " " for character in text)


def count(model: ModelConfig) -> int:
    """How many parameters it has."""
    import numpy as np

    return sum(int(np.prod(shape, dtype=np.int64)) for shape in leaf_shapes(model).values())


def _loading(kind: str, *, has_tokenizer: bool) -> str:
    if kind == "safetensors":
        return PARAMETERS.format(module="Decoder", config="ModelConfig", outputs="logits", inputs="tokens")
    is_own = bool(ALL[kind].code_files)
    trust = ", trust_remote_code=True" if is_own else ""
    unknown = "# It came without a tokenizer."
    return LOADING.format(
        trust=trust,
        use=WITH_TOKENIZER.format(trust=trust) if has_tokenizer else unknown,
        which=OWN_CODE if is_own else f"It is a `{ALL[kind].class_name}` of transformers.",
    )


def _records(source: Any) -> list[Mapping[str, Any]]:
    """What the run recorded up to this step."""
    from hybridnorm_jax.training.metrics_file import read_records

    return [record for record in read_records(source.directory) if record["step"] <= source.step]


def _training(source: Any, records: list[Mapping[str, Any]]) -> str:
    lines = _lines_of_training(source.config, source.step, records)
    return TRAINING.format(lines="\n".join(lines), data="\n".join(_data(source.config.data)))


def _lines_of_training(config: RunConfig, step: int, records: list[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a list: how long it was trained, and the newest losses."""
    train = config.train
    if records:
        tokens = step * train.batch_size * train.seq_len
        yield f"- {step:,} steps of {train.batch_size} x {train.seq_len} tokens: {tokens:,} tokens"
    else:
        yield f"- checkpoint of step {step:,}, which came without a record of its training"
    newest: dict[str, Any] = {}
    for record in records:
        newest |= {name: (record["step"], value) for name, value in record.items() if name.endswith("/loss")}
    for name, (at, value) in sorted(newest.items()):
        if value is not None:
            yield f"- `{name}` at step {at:,}: {value:.4f} nats per token"


def _data(data: DataSection) -> Iterator[str]:
    """Lines of a list: what was read."""
    if data.source == "stdlib":
        yield "- the source files of Python's standard library"
    for file in data.files[:MOST_FILES]:
        yield f"- `{plain(str(file))}`"
    if len(data.files) > MOST_FILES:
        yield f"- and {len(data.files) - MOST_FILES} more, in `training_config.yaml`"
    tokenizer = "the bytes of UTF-8" if data.tokenizer == "bytes" else f"`{plain(data.tokenizer)}`"
    yield f"- tokenizer: {tokenizer}" if data.knows_tokenizer else "- token files without a named tokenizer"
