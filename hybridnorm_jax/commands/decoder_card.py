"""The README.md of an exported decoder: how text is written with it, what it was trained on, how good it is."""

from collections.abc import Iterator
from typing import Any

from hybridnorm_jax.commands.model_card import Card, plain
from hybridnorm_jax.config.data_section import DataSection

# The whole configuration of the run, beside the weights.
TRAINING_CONFIG = "training_config.yaml"
MOST_FILES = 20
WITH_TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})
text = tokenizer.bos_token + "def "  # a document begins with this token
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"""
WITHOUT_TOKENIZER = "# It came without a tokenizer."
TRAINING = """
## Training

{training}
"""
REPEATED = f"""`{TRAINING_CONFIG}` is the whole configuration. The run is repeated with

```bash
hybridnorm train {TRAINING_CONFIG}
```"""
UNKNOWN_TRAINING = """The checkpoint of step {step:,} has no record of its training, like all that were converted from
weights alone or saved from Python."""


def decoder_card(source: Any, card: Card) -> str:
    """The text; `source` is commands.export.Source."""
    has_tokenizer = source.tokenizer is not None
    loading = card.loaded_by(
        source.config.model,
        "AutoModelForCausalLM",
        *(["AutoTokenizer"] if has_tokenizer else []),
        use=WITH_TOKENIZER.format(trust=card.trust) if has_tokenizer else WITHOUT_TOKENIZER,
    )
    made = "trained with" if source.knows_training else "written by"
    text = card.text(source.config.model, task="text-generation", what=f"A decoder that was {made}", loading=loading)
    return text + TRAINING.format(training="\n\n".join(_training(source)))


def _training(source: Any) -> Iterator[str]:
    """Paragraphs: how it was trained, how that is repeated, on which data; each where it is known."""
    if not source.knows_training:
        yield UNKNOWN_TRAINING.format(step=source.step)
        return
    yield "\n".join(_lines_of_training(source))
    if source.is_trained_run:
        yield REPEATED
    yield "Data:"
    yield "\n".join(_data(source.config.data))


def _lines_of_training(source: Any) -> Iterator[str]:
    """Lines of a list: how long it was trained, whether the weights are averaged, and the newest losses."""
    config, step, records = source.config, source.step, source.records
    train = config.train
    if records:
        tokens = step * train.batch_size * train.seq_len
        yield f"- {step:,} steps of {train.batch_size} x {train.seq_len} tokens: {tokens:,} tokens"
    else:
        yield f"- checkpoint of step {step:,}, which came without a record of its training"
    if source.which.has_average:
        average = f"the average of the parameters over the steps, `{config.optimizer.average_setting}`"
        yield f"- these weights are {'those of the last step, not ' if source.which.plain else ''}{average}"
    newest: dict[str, Any] = {}
    for record in records:
        newest |= {name: (record["step"], value) for name, value in record.items() if name.endswith("/loss")}
    for name, (at, value) in sorted(newest.items()):
        if value is not None:
            yield f"- `{name}` at step {at:,}: {value:.4f} nats per token"


def _data(data: DataSection) -> Iterator[str]:
    """Lines of a list: what was read."""
    for name, section in data.sources.items():
        of = f"{name}: " if name else ""
        if section.source == "stdlib":
            yield f"- {of}the source files of Python's standard library"
        for file in section.files[:MOST_FILES]:
            yield f"- {of}`{plain(str(file))}`"
        if len(section.files) > MOST_FILES:
            yield f"- {of}and {len(section.files) - MOST_FILES} more"
    tokenizer = "the bytes of UTF-8" if data.tokenizer == "bytes" else f"`{plain(data.tokenizer)}`"
    yield f"- tokenizer: {tokenizer}" if data.knows_tokenizer else "- token files without a named tokenizer"
