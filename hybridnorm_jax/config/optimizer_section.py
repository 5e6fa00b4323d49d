"""The section `optimizer` of a run's configuration."""

import dataclasses

from hybridnorm_jax.config.limits import LARGEST_RATE, MOST_STEPS, SMALLEST
from hybridnorm_jax.config.optimizer_kinds import OPTIMIZERS, OptimizerKind
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key

_OF_WSD = ("wsd_decay_fraction", "wsd_decay")
# Every schedule, and the keys of this section that others read and it does not.
UNREAD_BY_SCHEDULE: dict[str, tuple[str, ...]] = {
    "cosine": _OF_WSD,
    "linear": _OF_WSD,
    "wsd": (),
    "inverse_sqrt": ("final_ratio", *_OF_WSD),
    "piecewise": ("final_ratio", *_OF_WSD),
    "constant": ("final_ratio", *_OF_WSD),
}
SCHEDULES = tuple(UNREAD_BY_SCHEDULE)
# The forms in which the schedule `wsd` falls.
FALLS = ("linear", "cosine", "1-sqrt", "exponential")
MOMENT_DTYPES = ("float32", "bfloat16")
MUON_SCALES = ("match_rms_adamw", "original")
MUON_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and its learning-rate schedule."""

    name: str = key("adamw", " | ".join(OPTIMIZERS))
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
    eps: float = key(
        1e-8, "added to the root of the second moment of adamw, also beside muon", at_least=SMALLEST, at_most=1
    )
    weight_decay: float = key(0.1, "decoupled weight decay, times the learning rate", at_least=0, at_most=LARGEST_RATE)
    moment_dtype: str = key(
        "float32", "dtype of moments: float32 (float64 where parameters are) | bfloat16, rounded at random"
    )
    muon_momentum: float = key(0.95, "muon: decay of the mean of gradients", at_least=0, below=1)
    muon_nesterov: bool = key(True, "muon: the newest gradient counts once more")
    muon_steps: int = key(5, "muon: steps of Newton and Schulz's iteration", at_least=1, at_most=100)
    muon_scale: str = key(
        "match_rms_adamw", f"muon: by what orthogonal matrices are multiplied: {' | '.join(MUON_SCALES)}"
    )
    muon_rate_factor: float = key(
        1.0, "muon: learning rate of the matrices / learning rate", at_least=0, at_most=LARGEST_RATE
    )
    muon_dtype: str = key("bfloat16", "muon: dtype of the iteration: bfloat16 | float32")
    muon_except: tuple[str, ...] = key((), "muon: patterns of the paths of matrices that adamw updates")
    adafactor_decay: float = key(
        0.8, "adafactor: after t updates the newest squares count t^-this", at_least=0, at_most=10
    )
    adafactor_clip: float = key(
        1.0, "adafactor: largest RMS of the direction of a parameter", at_least=SMALLEST, at_most=1e9
    )
    adafactor_scale: bool = key(True, "adafactor: directions are multiplied by the RMS of the parameter")
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
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        check_choice("optimizer.muon_scale", self.muon_scale, MUON_SCALES)
        check_choice("optimizer.muon_dtype", self.muon_dtype, MUON_DTYPES)
        self._check_keys_of_others()
        self._check_averaged_steps()
        narrow = self.moment_dtype != "float32"
        right = f"{self.name} keeps a few means of squares, which need float32 and hardly any memory"
        check(not narrow or self.kind.narrow_moments, "optimizer.moment_dtype", self.moment_dtype, right)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_choice("optimizer.wsd_decay", self.wsd_decay, FALLS)
        self._check_pieces()
        falls = self.final_ratio > 0 or self.schedule != "wsd" or self.wsd_decay != "exponential"
        right = "must be above 0; a rate that falls exponentially (optimizer.wsd_decay) does not reach 0"
        check(falls, "optimizer.final_ratio", self.final_ratio, right)
        one = self.warmup_tokens is None or self.warmup_steps == 0
        check(one, "optimizer.warmup_tokens", self.warmup_tokens, "cannot be set together with optimizer.warmup_steps")

    @property
    def kind(self) -> OptimizerKind:
        """The row of the table of optimizers."""
        return OPTIMIZERS[self.name]

    @property
    def averages(self) -> bool:
        """Whether other parameters are evaluated and exported than those that are trained: their average."""
        return self.ema_decay is not None or self.kind.averages_steps

    @property
    def average_setting(self) -> str:
        """The setting that makes `averages` true."""
        return f"optimizer.name={self.name}" if self.ema_decay is None else f"optimizer.ema_decay={self.ema_decay:g}"

    @property
    def pieces(self) -> list[tuple[int, float]]:
        """(steps, rate after them / peak) of the schedule `piecewise`, by steps."""
        return sorted((int(steps), factor) for steps, factor in self.piecewise.items())

    def _check_keys_of_others(self) -> None:
        """Raise ConfigError where a key is set that this optimizer does not read."""
        for field in dataclasses.fields(self):
            of, _, _ = field.name.partition("_")
            if of in OPTIMIZERS and of != self.name:
                value = getattr(self, field.name)
                is_default = value == field.default
                check(is_default, f"optimizer.{field.name}", value, f"only for optimizer.name={of}")

    def _check_averaged_steps(self) -> None:
        if not self.kind.averages_steps:
            return
        setting = f"optimizer.name={self.name}"
        right = f"{setting} averages its steps instead; needs constant, which may have a warm-up"
        check(self.schedule == "constant", "optimizer.schedule", self.schedule, right)
        right = f"{setting} needs a number above 0, the share of the average in the parameters"
        check(self.b1 > 0, "optimizer.b1", self.b1, right)
        right = f"{setting} has an average of its own; leave one of the two out"
        check(self.ema_decay is None, "optimizer.ema_decay", self.ema_decay, right)

    def _check_pieces(self) -> None:
        name, asked = "optimizer.piecewise", self.schedule == "piecewise"
        check(asked or not self.piecewise, name, self.piecewise, "needs optimizer.schedule=piecewise")
        right = "optimizer.schedule=piecewise needs steps, such as {3000: 0.3, 4000: 0.1}"
        check(not asked or bool(self.piecewise), name, self.piecewise, right)
        most = len(str(MOST_STEPS))
        for steps, factor in self.piecewise.items():
            is_number = steps.isascii() and steps.isdigit() and len(steps) <= most and steps == str(int(steps))
            right = f"must be named by a number of steps, from 0 to {MOST_STEPS:,} and in digits"
            check(is_number and int(steps) <= MOST_STEPS, f"{name}.{steps}", factor, right)
