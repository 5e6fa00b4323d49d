"""Text and tokens on disk -> deterministic batches. Needs no JAX of its own; processes are told by number."""

from hybridnorm_jax.data.dataset import Data, open_data
from hybridnorm_jax.data.pipeline import train_iterator, validation_batches
from hybridnorm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hybridnorm_jax.data.windows import Windows
from hybridnorm_jax.errors import DataError

__all__ = [
    "Data",
    "DataError",
    "Tokenizer",
    "Windows",
    "load_tokenizer",
    "open_data",
    "train_iterator",
    "validation_batches",
]
