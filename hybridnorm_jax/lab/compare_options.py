"""What a comparison combines: schemes and variants, seeds, learning rates, and the budget of every run."""

import dataclasses
import itertools
import shlex
from collections.abc import Mapping, Sequence

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.limits import LARGEST_RATE, LARGEST_SEED, SMALLEST
from hybridnorm_jax.config.resume_keys import warmup_steps
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key, spelled
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.labels import measured_otherwise, settings
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.whole_files import expanded

DEFAULT = "lab"
STEPS = "train.steps"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What is combined."""

    schemes: tuple[str, ...] = key(("pre", "post", "hybrid", "hybrid_star", "span", "peri"), "norm placements")
    variants: tuple[str, ...] = key(
        (),
        "settings that every scheme is trained with, each one or several key=value: depths, widths, warm-ups, such as "
        "[model.num_layers=12, model.num_layers=24]; none: those of the configuration",
    )
    seeds: tuple[int, ...] = key(
        (0, 1, 2),
        "values of train.seed; train.data_seed, the same for all, decides the order of the data",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    learning_rates: tuple[float, ...] = key(
        (),
        "peak learning rates, each with all seeds; none: that of the configuration",
        at_least=SMALLEST,
        at_most=LARGEST_RATE,
    )
    sweep: tuple[float, ...] = key(
        (),
        "instead of learning_rates: a grid of peak rates in factors of 2, of which each scheme's best is sought with "
        "sweep_seeds, beyond the grid where the best lies at its edge, and between its points; seeds then have it",
        at_least=SMALLEST,
        at_most=LARGEST_RATE,
    )
    sweep_seeds: tuple[int, ...] = key(
        (100,),
        "seeds of the sweep, none of seeds: the choice of a rate favors the runs that it was made with",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    tokens: int | None = key(None, "tokens of each run, instead of train.steps", at_least=1, at_most=10**18)
    flops: float | None = key(
        None,
        "arithmetic operations of each run, instead of train.steps: a scheme whose steps cost more makes fewer",
        at_least=1,
        at_most=1e30,
    )
    together: int = key(
        1,
        "how many runs of a scheme are trained at once, for a GPU or TPU that a small model leaves mostly idle; on a "
        "CPU this takes longer than one by one",
        at_least=1,
        at_most=1024,
    )

    def __post_init__(self) -> None:
        check_fields("", self)
        for name, values in dataclasses.asdict(self).items():
            if isinstance(values, tuple):
                may_be_empty = name in ("learning_rates", "variants", "sweep")
                check(bool(values) or may_be_empty, name, "[]", "at least one is needed")
                check(len(set(values)) == len(values), name, values, "one of them is named twice")
        check(len(self.sweep) != 1, "sweep", self.sweep, "a grid needs at least two rates")
        both = bool(self.sweep) and bool(self.learning_rates)
        check(not both, "learning_rates", self.learning_rates, "sweep looks for the rates; name one of the two")
        shared = sorted(set(self.seeds) & set(self.sweep_seeds)) if self.sweep else []
        check(not shared, "sweep_seeds", self.sweep_seeds, f"must have none of seeds, and has {spelled(shared)}")
        both = self.tokens is not None and self.flops is not None
        check(not both, "flops", self.flops, "cannot be set together with tokens")

    @property
    def protocol_name(self) -> str:
        """How a directory that is not named says how long the runs are and how their rates are chosen."""
        budgets = [
            f"-{name}={getattr(self, name):g}" for name in ("tokens", "flops") if getattr(self, name) is not None
        ]
        return "".join(["-sweep" if self.sweep else "", *budgets])

    @property
    def keys_of_runs(self) -> dict[str, str]:
        """Key of a run that is set here -> what sets it."""
        keys = {"model.scheme": "schemes=[...]", "train.seed": "seeds=[...]"}
        for name in ("learning_rates", "sweep"):
            if getattr(self, name):
                keys["optimizer.learning_rate"] = f"{name}=[...]"
        for name in ("tokens", "flops"):
            if getattr(self, name) is not None:
                keys[STEPS] = f"{name}=..."
        return keys


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A scheme with one of the variants.

    Attributes:
      name: what the names of its runs begin with.
      config: of its runs, but for the seed and, with several, the learning rate.
    """

    name: str
    config: RunConfig


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A directory of runs that differ in scheme, variant, learning rate and seed.

    Attributes:
      directory: run.dir/run.name of the arguments; run.name=auto stands for compare-<its name>.
      arguments: those of `hybridnorm lab compare` that ask for it.
      options: what is combined.
      contestants: by scheme, then variant.
    """

    directory: str
    arguments: tuple[str, ...]
    options: CompareOptions
    contestants: tuple[Contestant, ...]

    @property
    def command(self) -> str:
        """The command that asks for it, as it is typed."""
        return shlex.join(["hybridnorm", "lab", "compare", *self.arguments])

    @property
    def configs(self) -> tuple[RunConfig, ...]:
        """One for each combination that is known from the start, by contestant, then learning rate, then seed.

        With a sweep, those of its grid.
        """
        seeds = self.options.sweep_seeds if self.options.sweep else self.options.seeds
        return tuple(
            run_config(contestant, self.directory, rate=rate, seed=seed)
            for contestant in self.contestants
            for rate, seed in itertools.product(self.rates(contestant), seeds)
        )

    @property
    def parts(self) -> int:
        """How many jobs can share it: one for each combination or, with a sweep, for each contestant."""
        return len(self.contestants if self.options.sweep else self.configs)

    def rates(self, contestant: Contestant) -> tuple[float, ...]:
        """The learning rates of a contestant that are known from the start."""
        return self.options.sweep or self.options.learning_rates or (contestant.config.optimizer.learning_rate,)


def comparison(arguments: Sequence[str]) -> Comparison:
    """The comparison that `[CONFIG ...] [schemes=...] [seeds=...] [sweep=...] [key=value ...]` asks for.

    Raises:
      ConfigError: one line, before anything is trained: an argument is wrong, or a combination of values is.
    """
    options, others = take(CompareOptions, arguments)
    lab_keys = options.keys_of_runs
    refuse(others, lab_keys)
    base = parse(others, DEFAULT)  # imports plugins, which may bring schemes
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    is_named = any(argument.startswith("run.name=") for argument in others)
    # Another protocol is another comparison, and needs a directory of its own.
    name = base.run.name if is_named else f"compare-{base.run.name}{options.protocol_name}"
    contestants = [
        _contestant(_variant(others, variant, lab_keys) if variant else base, scheme, variant, options.tokens)
        for scheme in options.schemes
        for variant in [_words(text) for text in options.variants] or [[]]
    ]
    asked = Comparison(
        directory=f"{expanded(base.run.dir)}/{name}",
        arguments=tuple(arguments),
        options=options,
        contestants=tuple(contestants),
    )
    _check_validated(asked)
    if options.flops is None:
        for contestant in contestants:
            check_budget(contestant.config)
    _check_comparable(contestants, may_differ=() if options.flops is None else (STEPS,))
    _check_names(asked)
    return asked


def refuse(arguments: Sequence[str], lab_keys: Mapping[str, str]) -> None:
    """Raise ConfigError for an argument that sets a key which the lab sets itself.

    Args:
      lab_keys: key of a run -> what of the lab sets it.
    """
    for argument in arguments:
        lab_key = lab_keys.get(argument.partition("=")[0])
        if lab_key is not None:
            raise ConfigError(f"{argument}: {lab_key} sets it here")


def check_budget(config: RunConfig) -> None:
    """Raise ConfigError for a run that would end before its learning rate is at its peak."""
    warmup = warmup_steps(config.optimizer, config.tokens_per_step)
    right = f"must be more than the {warmup} steps of warm-up (optimizer.warmup_steps or warmup_tokens)"
    check(config.train.steps > warmup, STEPS, config.train.steps, right)


def _check_validated(asked: Comparison) -> None:
    """Raise ConfigError for a sweep without anything to choose by."""
    section = asked.contestants[0].config.data
    right = "needs a validation set to choose by: data.validation_fraction or data.validation"
    has_set = bool(section.validation_fraction or section.validation)
    check(not asked.options.sweep or has_set, "sweep", asked.options.sweep, right)


def _check_comparable(contestants: Sequence[Contestant], may_differ: Sequence[str]) -> None:
    """Raise ConfigError for contestants whose runs no report would compare: it would say so only after training."""
    first = contestants[0]
    for other in contestants[1:]:
        different = measured_otherwise(first.config, other.config, may_differ)
        seeds = [each.config.train.data_seed for each in (first, other)]
        if seeds[0] != seeds[1]:
            different.append(f"train.data_seed ({spelled(seeds[0])} and {spelled(seeds[1])})")
        if different:
            pair = f"{first.name} and {other.name}"
            raise ConfigError(f"variants: {pair} differ in {different[0]}: such runs cannot be compared")
    for one, other in itertools.combinations(contestants, 2):
        if one.name == other.name or settings(one.config) == settings(other.config):
            raise ConfigError(f"variants: {one.name} and {other.name} are the same runs; remove one of them")


def _check_names(asked: Comparison) -> None:
    """Raise ConfigError for runs of one name, or for a rate or a name that cannot be."""
    names = [config.run.name for config in asked.configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: two runs have this name; learning rates must differ in their first six digits")


def with_steps(contestant: Contestant, steps: int) -> Contestant:
    """The same with another number of steps."""
    config = contestant.config
    return dataclasses.replace(
        contestant, config=dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    )


def run_config(contestant: Contestant, directory: str, *, rate: float, seed: int) -> RunConfig:
    """The configuration of one run."""
    base = contestant.config
    data_seed = 0 if base.train.data_seed is None else base.train.data_seed
    name = f"{contestant.name}-lr{rate:g}-seed{seed}"
    group = base.run.group or directory.rpartition("/")[2]
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, dir=directory, name=name, group=group),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed, data_seed=data_seed),
    )


def _words(variant: str) -> list[str]:
    """The key=value of a variant."""
    try:
        return shlex.split(variant)
    except ValueError as error:
        raise ConfigError(f"variants={variant}: {error}") from error


def _variant(others: Sequence[str], variant: Sequence[str], lab_keys: Mapping[str, str]) -> RunConfig:
    """The configuration with the settings of a variant."""
    for setting in variant:
        check("=" in setting and "." in setting.partition("=")[0], "variants", setting, "must be key=value of a run")
    refuse(variant, {**lab_keys, "run.name": "the comparison", "run.dir": "the comparison"})
    return parse([*others, *variant], DEFAULT)


def _contestant(base: RunConfig, scheme: str, variant: Sequence[str], tokens: int | None) -> Contestant:
    named = [setting.partition("=") for setting in variant]
    parts = [f"{name.rpartition('.')[2]}={value}" for name, _, value in named]
    contestant = Contestant(
        name="-".join([scheme, *parts]).replace("/", "_"),
        config=dataclasses.replace(base, model=base.model.with_scheme(scheme)),
    )
    if tokens is None:
        return contestant
    steps = tokens // base.tokens_per_step
    check(steps > 0, "tokens", tokens, f"must be at least the {base.tokens_per_step} tokens of a step")
    return with_steps(contestant, steps)
