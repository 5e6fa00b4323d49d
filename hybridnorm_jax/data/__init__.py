"""From text and tokens on disk to deterministic batches.

Sources and token files, tokenizers, the cache of tokenized text, rows of them (windows over a long stream of tokens, or
whole documents), and the Grain pipeline that shuffles these into batches, in NumPy arrays. How the mesh splits a batch
is in mesh; what a step does with one is in training and evaluation.
"""

from typing import TYPE_CHECKING

import lazy_loader

from hybridnorm_jax.errors import DataError

if TYPE_CHECKING:
    from hybridnorm_jax.data.dataset import Data, open_data
    from hybridnorm_jax.data.pipeline import train_iterator, validation_batches
    from hybridnorm_jax.data.rows import Rows
    from hybridnorm_jax.data.tokenizers import Tokenizer, load_tokenizer
    from hybridnorm_jax.data.windows import Windows

# Imported on first use: the pipeline brings Grain and with it JAX, which processes that only tokenize do not need.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["Data", "open_data"],
        "pipeline": ["train_iterator", "validation_batches"],
        "rows": ["Rows"],
        "tokenizers": ["Tokenizer", "load_tokenizer"],
        "windows": ["Windows"],
    },
)

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
