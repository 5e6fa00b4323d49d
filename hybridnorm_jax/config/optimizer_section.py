"""The section `optimizer` of a run's configuration."""

import dataclasses

from hybridnorm_jax.config.limits import LARGEST_RATE, MOST_STEPS, SMALLEST
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = key(3e-4, "peak learning rate", at_least=SMALLEST, at_most=LARGEST_RATE)
    final_ratio: float = key(0.1, "final learning rate / peak", at_least=0, at_most=1)
    schedule: str = key("cosine", "after the warm-up: cosine | linear | wsd | constant")
    warmup_steps: int = key(0, "steps of linear warm-up from 0", at_least=0, at_most=MOST_STEPS)
    warmup_tokens: int | None = key(
        None, "tokens of linear warm-up, instead of warmup_steps", at_least=0, at_most=10**18
    )
    wsd_decay_fraction: float = key(
        0.1, "wsd: share of all steps, at the end, in which the rate falls linearly", at_least=0, at_most=1
    )
    b1: float = key(0.9, "decay of the first moment", at_least=0, below=1)
    b2: float = key(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = key(1e-8, "added to the root of the second moment", at_least=SMALLEST, at_most=1)
    weight_decay: float = key(0.1, "decoupled weight decay, times the learning rate", at_least=0, at_most=LARGEST_RATE)
    balance_bias_rate: float = key(
        1e-3,
        "model.balance_bias: what a step adds to, or takes from, each expert's bias",
        at_least=0,
        at_most=LARGEST_RATE,
    )
    decay_embeddings: bool = key(False, "token and position embeddings decay too")
    decay_norms_and_biases: bool = key(
        True, "biases and the scales of norms decay too; learned scales of branches, heads and the like never do"
    )
    clip: float | None = key(
        1.0, "largest global norm of the gradient; null: no clipping", at_least=SMALLEST, at_most=1e9
    )

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        one = self.warmup_tokens is None or self.warmup_steps == 0
        check(one, "optimizer.warmup_tokens", self.warmup_tokens, "cannot be set together with optimizer.warmup_steps")
