"""How each cheap claim of claims.yaml is measured, by its id."""

from collections.abc import Callable
from functools import partial

from hybridnorm_jax.lab.claims import at_start, coupling, forms, speed, training
from hybridnorm_jax.lab.claims.claim import Finding

WEIGHTS, STREAM, RMS = "gradient/block", "stream_gradient", "stream_rms"
ENTROPY, SIMILARITY = "attention_entropy", "token_similarity"
RMSNORM, CRMSNORM = "pre_rmsnorm", "pre_crmsnorm"

MEASURES: dict[str, Callable[[], Finding]] = {
    "pre-stream-grows": partial(at_start.checked, "pre", RMS, initializer="normal"),
    "pre-gradients-grow": partial(at_start.checked, "pre", WEIGHTS, initializer="normal"),
    "pre-gradients-grow-trained": partial(training.checked, "pre", WEIGHTS),
    "post-gradients-shrink": partial(at_start.checked, "post", WEIGHTS, initializer="normal"),
    "post-gradients-shrink-trained": partial(training.checked, "post", WEIGHTS),
    "hybrid-weight-gradients-flat": partial(at_start.checked, "hybrid", WEIGHTS, initializer="megatron"),
    "hybrid-stream-gradients-flat": partial(at_start.checked, "hybrid", STREAM, initializer="megatron"),
    "hybrid-gradients-flat-trained": partial(training.checked, "hybrid", WEIGHTS),
    "theorem-2": partial(coupling.decoupled, scheme="hybrid", without="pre"),
    "hybrid-entropy-start": partial(at_start.above_baseline, ENTROPY, scheme="hybrid", baseline="pre", sign=1),
    "hybrid-entropy-trained": partial(training.above_baseline, ENTROPY, scheme="hybrid", baseline="pre", sign=1),
    "hybrid-similarity-start": partial(at_start.above_baseline, SIMILARITY, scheme="hybrid", baseline="pre", sign=-1),
    "hybrid-similarity-trained": partial(training.above_baseline, SIMILARITY, scheme="hybrid", baseline="pre", sign=-1),
    "lossless-rmsnorm": partial(forms.lossless, RMSNORM),
    "lossless-crmsnorm": partial(forms.lossless, CRMSNORM),
    "lossless-vit": partial(forms.lossless, CRMSNORM, model=forms.VIT),
    "crmsnorm-formula": forms.norm_formula,
    "crmsnorm-from-scratch": forms.from_scratch,
    "training-rmsnorm": partial(training.equal_curves, RMSNORM, dtype="float64"),
    "training-crmsnorm": partial(training.equal_curves, CRMSNORM, dtype="float64"),
    "training-rmsnorm-float32": partial(training.equal_curves, RMSNORM, dtype="float32"),
    "training-crmsnorm-float32": partial(training.equal_curves, CRMSNORM, dtype="float32"),
    "training-converted": partial(training.another_trajectory, RMSNORM),
    "training-dropout": forms.equal_under_dropout,
    "bfloat16-mean": forms.mean_in_bfloat16,
    "training-bfloat16": partial(training.equal_curves, CRMSNORM, dtype="bfloat16"),
    "speed-training-rmsnorm": partial(speed.training_faster, RMSNORM),
    "speed-training-crmsnorm": partial(speed.training_faster, CRMSNORM),
    "speed-forward-rmsnorm": partial(speed.forward_faster, RMSNORM),
    "speed-forward-crmsnorm": partial(speed.forward_faster, CRMSNORM),
    "span-signal-bounded": partial(at_start.stream_is_bounded, scheme="span", initializer="megatron"),
    "span-gradients-bounded": partial(at_start.checked, "span", WEIGHTS, initializer="megatron"),
    "span-stream-gradients-bounded": partial(at_start.checked, "span", STREAM, initializer="megatron"),
    "span-gradients-need-scaling": partial(at_start.checked, "span", WEIGHTS, initializer="normal"),
    "span-speed": partial(speed.as_fast, scheme="span", baseline="pre"),
}
