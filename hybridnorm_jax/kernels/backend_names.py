"""The names by which kernels are asked for, and the name of what attention keeps for its backward pass. No JAX here."""

ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "flash", "splash")
LOSS_KERNELS = ("xla", "pallas")
EXPERT_DISPATCHES = ("auto", "dense", "blocked", "ragged", "gmm", "fused", "grouped")
# jax.checkpoint_policies.save_only_these_names(SAVED) keeps what the backward pass of xla, flash and splash needs
# besides q, k and v: the context and, per query, the logarithm of the softmax's denominator.
SAVED = "attention_residuals"
# What the splash kernel's blocks are made of; positions are filled up to a multiple.
SPLASH_TILE = 128
# The feature -> what the user reads of a backend that lacks it.
FEATURES = {
    "bidirectional": "computes causal attention only",
    "windows": "has no sliding windows (model.windows)",
    "score_cap": "has no soft cap of scores (model.score_cap)",
    "sinks": "has no attention sinks (model.attention_sinks)",
    "alibi": "adds nothing to scores (model.positions=alibi)",
}


def features_of(*, causal: bool, windows: bool, cap: bool, sinks: bool, alibi: bool) -> tuple[str, ...]:
    """The names of FEATURES that are asked for."""
    asked = {"bidirectional": not causal, "windows": windows, "score_cap": cap, "sinks": sinks, "alibi": alibi}
    return tuple(name for name, is_asked in asked.items() if is_asked)
