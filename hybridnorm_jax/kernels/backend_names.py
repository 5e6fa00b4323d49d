"""The names by which kernels are asked for, and the name of what attention keeps for its backward pass. No JAX here."""

ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "flash", "splash")
EXPERT_DISPATCHES = ("auto", "dense", "blocked", "ragged", "gmm", "fused", "grouped")
# jax.checkpoint_policies.save_only_these_names(SAVED) keeps what the backward pass of xla, flash and splash needs
# besides q, k and v: the context and, per query, the logarithm of the softmax's denominator.
SAVED = "attention_residuals"
# What the splash kernel's blocks are made of; positions are filled up to a multiple.
SPLASH_TILE = 128
