"""The section `optimizer` of a run's configuration."""

import dataclasses

from hybridnorm_jax.config.limits import LARGEST_RATE, MOST_STEPS, SMALLEST
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key

SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "piecewise", "constant")
# The forms in which the schedule `wsd` falls.
FALLS = ("linear", "cosine", "1-sqrt", "exponential")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = key(3e-4, "peak learning rate", at_least=SMALLEST, at_most=LARGEST_RATE)
    final_ratio: float = key(0.1, "final learning rate / peak", at_least=0, at_most=1)
    schedule: str = key("cosine", f"after the warm-up: {' | '.join(SCHEDULES)}")
    warmup_steps: int = key(0, "steps of linear warm-up from 0", at_least=0, at_most=MOST_STEPS)
    warmup_tokens: int | None = key(
        None, "tokens of linear warm-up, instead of warmup_steps", at_least=0, at_most=10**18
    )
    wsd_decay_fraction: float = key(
        0.1, "wsd: share of all steps, at the end, in which the rate falls", at_least=0, at_most=1
    )
    wsd_decay: str = key("linear", f"wsd: the form in which the rate falls: {' | '.join(FALLS)}")
    piecewise: dict[str, float] = key(
        {},
        "piecewise: step -> rate after that many steps / peak, such as {3000: 0.3, 4000: 0.1}",
        at_least=0,
        at_most=LARGEST_RATE,
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
    rate_factors: dict[str, float] = key(
        {},
        "groups of parameters with a learning rate of their own: pattern of their paths -> factor, such as "
        "{'*/router/kernel': 0.1}; the last pattern that fits counts",
        at_least=0,
        at_most=LARGEST_RATE,
    )
    weight_decays: dict[str, float] = key(
        {},
        "groups with a weight decay of their own, which the two keys above do not decide: pattern -> weight decay",
        at_least=0,
        at_most=LARGEST_RATE,
    )
    clip: float | None = key(
        1.0, "largest global norm of the gradient; null: no clipping", at_least=SMALLEST, at_most=1e9
    )
    ema_decay: float | None = key(
        None,
        "average the parameters over the steps, a step this much less than the one after it; the average is what is "
        "evaluated and exported; null: no average",
        above=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_fields("optimizer", self)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_choice("optimizer.wsd_decay", self.wsd_decay, FALLS)
        self._check_pieces()
        falls = self.final_ratio > 0 or self.schedule != "wsd" or self.wsd_decay != "exponential"
        right = "must be above 0; a rate that falls exponentially (optimizer.wsd_decay) does not reach 0"
        check(falls, "optimizer.final_ratio", self.final_ratio, right)
        one = self.warmup_tokens is None or self.warmup_steps == 0
        check(one, "optimizer.warmup_tokens", self.warmup_tokens, "cannot be set together with optimizer.warmup_steps")

    @property
    def pieces(self) -> list[tuple[int, float]]:
        """(steps, rate after them / peak) of the schedule `piecewise`, by steps."""
        return sorted((int(steps), factor) for steps, factor in self.piecewise.items())

    def _check_pieces(self) -> None:
        name, asked = "optimizer.piecewise", self.schedule == "piecewise"
        check(asked or not self.piecewise, name, self.piecewise, "needs optimizer.schedule=piecewise")
        right = "optimizer.schedule=piecewise needs steps, such as {3000: 0.3, 4000: 0.1}"
        check(not asked or bool(self.piecewise), name, "{}", right)
        most = len(str(MOST_STEPS))
        for steps, factor in self.piecewise.items():
            is_number = steps.isascii() and steps.isdigit() and len(steps) <= most and steps == str(int(steps))
            right = f"must be named by a number of steps, from 0 to {MOST_STEPS:,} and in digits"
            check(is_number and int(steps) <= MOST_STEPS, f"{name}.{steps}", factor, right)
