"""From text and tokens on disk to deterministic batches.

Sources and token files, tokenizers, the cache of tokenized text, rows of them (windows over a long stream of tokens, or
whole documents), and the Grain pipeline that shuffles these into batches, in NumPy arrays. How the mesh splits a batch
is in mesh; what a step does with one is in training and evaluation.
"""

from hybridnorm_jax.data.dataset import Data, open_data
from hybridnorm_jax.data.pipeline import train_iterator, validation_batches
from hybridnorm_jax.data.rows import Rows
from hybridnorm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hybridnorm_jax.data.windows import Windows
from hybridnorm_jax.errors import DataError

__all__ = [
    "Data",
    "DataError",
    "Rows",
    "Tokenizer",
    "Windows",
    "load_tokenizer",
    "open_data",
    "train_iterator",
    "validation_batches",
]
