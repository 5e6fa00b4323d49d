"""The README.md of an exported encoder: which class loads it, what it reads and gives."""

from hybridnorm_jax.commands.model_card import Card
from hybridnorm_jax.model.encoder_config import EncoderConfig

PIXELS = """`pixel_values` has the shape (batch, {channels}, {height}, {width}). The image processor of the model that
this one was made of says how pixels are scaled."""
TOKENS = "`input_ids` has the shape (batch, tokens). The tokenizer is that of the model that this one was made of."


def auto_class(config: EncoderConfig) -> str:
    """Which of transformers' Auto classes loads it."""
    if config.num_classes is None:
        return "AutoModel"
    return "AutoModelForImageClassification" if config.reads_pixels else "AutoModelForSequenceClassification"


def encoder_card(config: EncoderConfig, card: Card) -> str:
    """The text."""
    tasks = {"AutoModel": "image-feature-extraction" if config.reads_pixels else "feature-extraction"}
    tasks["AutoModelForImageClassification"] = "image-classification"
    tasks["AutoModelForSequenceClassification"] = "text-classification"
    auto = auto_class(config)
    called = f"model({'pixel_values=pixels' if config.reads_pixels else 'input_ids=tokens'})"
    features = f"outputs = {called}  # last_hidden_state and, where something is pooled, pooler_output"
    height, width = config.image_size
    pixels = PIXELS.format(channels=config.num_channels, height=height, width=width)
    loading = card.loaded_by(
        config,
        auto,
        use=features if config.num_classes is None else f"logits = {called}.logits",
        inputs=pixels if config.reads_pixels else TOKENS,
    )
    return card.text(config, task=tasks[auto], what="An encoder that was written by", loading=loading)
