"""Texts of random letters, and the arguments of the smallest runs on them."""

import random

# In the working directory; what is read and how long is left to the test.
TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "model.scheme=pre"),
    *("train.batch_size=8", "train.seq_len=8", "eval.batches=1", "train.sample_tokens=0"),
    *("run.dir=runs", "data.cache_dir=cache"),
]


def lettered_text(seed):
    """400 lines of eight letters each."""
    rng = random.Random(seed)
    return "".join(f"{' '.join(rng.choices('abcdefgh', k=8))}\n" for _ in range(400))
