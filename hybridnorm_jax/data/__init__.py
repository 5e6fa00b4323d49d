"""From text and tokens on disk to deterministic batches.

Five folders, each of which imports only from those named after it: rows (what a step trains on), tokens (ids), text
(documents), files (which ones), places (where they are). The files here put them together: opened_source.py opens one
source and dataset.py all of a run, mixture.py weighs them, pipeline.py makes batches of their rows with Grain, in NumPy
arrays. How the mesh splits a batch is in mesh; what a step does with one is in training and evaluation.
"""

from typing import TYPE_CHECKING

import lazy_loader

from hybridnorm_jax.errors import DataError

if TYPE_CHECKING:
    from hybridnorm_jax.data.dataset import Data, open_data
    from hybridnorm_jax.data.pipeline import train_iterator, validation_batches
    from hybridnorm_jax.data.rows.rows import Rows
    from hybridnorm_jax.data.rows.windows import Windows
    from hybridnorm_jax.data.tokens.tokenizers import Tokenizer, load_tokenizer

# Imported on first use: the pipeline brings Grain and with it JAX, which processes that only tokenize do not need.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["Data", "open_data"],
        "pipeline": ["train_iterator", "validation_batches"],
        "rows.rows": ["Rows"],
        "tokens.tokenizers": ["Tokenizer", "load_tokenizer"],
        "rows.windows": ["Windows"],
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
