"""The arguments of comparisons that train in moments."""

SMALL = [
    "model.d_model=16",
    "model.num_heads=2",
    "model.mlp_dim=16",
    "model.num_layers=1",
    "model.vocab_size=61",
    "train.steps=6",
    "train.batch_size=8",
    "train.seq_len=8",
    "train.log_every=2",
    "train.max_bad_steps=2",
    "train.watch_every=null",
    "checkpoint.every=3",
    "eval.every=100",
    "eval.batches=1",
    "optimizer.warmup_steps=0",
]


def without(arguments, *keys):
    """The arguments but for those that set one of these keys."""
    return [argument for argument in arguments if argument.partition("=")[0] not in keys]
