"""How much of each source a run reads until which step, and whether its sources suffice."""

import dataclasses
import itertools
from collections.abc import Mapping

from hybridnorm_jax.config.mixture_section import Stage as WeightedStage
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data.dataset import HELD_OUT, Data, Source
from hybridnorm_jax.data.rows.allotment import Allotment, Stage
from hybridnorm_jax.data.rows.dealt_tokens import DealtTokens
from hybridnorm_jax.data.rows.order import EpochOrder, MixtureOrder, Order, seed_of_source
from hybridnorm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Amount:
    """What of a source is read.

    Attributes:
      mean_tokens: of so many rows, if each had the mean number of tokens; Mixture.tokens_until has the exact number.
      epochs: how often that is the whole source.
    """

    mean_tokens: int
    epochs: float


@dataclasses.dataclass(frozen=True)
class StageShares:
    """A stage as people are told of it: its first step (from 1 on), its last, and the share of tokens by source."""

    first: int
    last: int
    shares: dict[str, float]


class Mixture:
    """The sources of a run with data.mixture, and how they are mixed."""

    def __init__(self, config: RunConfig, sources: Mapping[str, Source]):
        """Prepare.

        Args:
          config: of the run; it has a mixture.
          sources: of Data, by name.

        Raises:
          DataError: weights count documents, and a source does not know how many it has.
        """
        self._config = config
        self._sources = sources
        self._names = sorted(sources)
        self._steps = config.train.steps
        self._batch_size = config.train.batch_size
        stages = config.data.mixture_stages(self._steps)
        self._stages = [Stage(stage.step * self._batch_size, self._rows_by_weight(stage)) for stage in stages]
        seed, rounds = config.train.order_seed, config.train.shuffle_rounds
        self._allotment = Allotment(self._stages, seed)
        self._epochs = [
            EpochOrder(sources[name].train, seed_of_source(seed, name), rounds=rounds) for name in self._names
        ]
        self._dealt = [DealtTokens(order, seq_len=config.train.seq_len) for order in self._epochs]

    def order(self) -> Order:
        """The rows of the run, one after the other."""
        return MixtureOrder(self._epochs, self._allotment)

    def read_until(self, step: int) -> dict[str, Amount]:
        """What of each source the first `step` steps read, by the source's name, in the order of data.mixture."""
        return {name: self._amount(name, rows) for name, rows in self._rows_until(step).items()}

    def tokens_until(self, step: int) -> dict[str, int]:
        """How many tokens of each source the first `step` steps read, to the last one; padding is none.

        It takes long where `step` is far from that of the last question: up to 0.7 s for ten million rows that are not
        full. Nothing is read, and no process needs to ask another one.
        """
        dealt = dict(zip(self._names, self._dealt, strict=True))
        return {name: dealt[name].of_first(rows) for name, rows in self._rows_until(step).items()}

    def _rows_until(self, step: int) -> dict[str, int]:
        rows = dict(zip(self._names, self._allotment.taken(step * self._batch_size).tolist(), strict=True))
        return {name: rows[name] for name in self._sources}

    @property
    def shares_of_sets(self) -> dict[str, float] | None:
        """The share of each source in all tokens of the run, for the mean of their held-out sets; None: there is none.

        There is none where nothing is held out, and where data.validation names a set that is compared instead.
        """
        data = self._config.data
        if not data.validation_fraction or HELD_OUT in data.validation:
            return None
        tokens = {name: amount.mean_tokens for name, amount in self.read_until(self._steps).items()}
        return {name: count / sum(tokens.values()) for name, count in tokens.items()}

    def stage_shares(self) -> list[StageShares]:
        """The stages, each with the share of its tokens that comes from each source."""
        steps = [stage.first // self._batch_size for stage in self._stages] + [self._steps]
        found = []
        for first, last in itertools.pairwise(steps):
            before, after = self.read_until(first), self.read_until(last)
            tokens = {name: after[name].mean_tokens - before[name].mean_tokens for name in self._sources}
            total = sum(tokens.values())
            found.append(StageShares(first + 1, last, {name: count / total for name, count in tokens.items()}))
        return found

    def check_epochs(self) -> None:
        """Refuse a run that would read a source more often than data.mixture.NAME.epochs allows.

        Raises:
          DataError: names the source, its epochs at the end of training, and what would be right.
        """
        for name, amount in self.read_until(self._steps).items():
            most = self._config.data.mixture[name].epochs
            if most is None or amount.epochs <= most:
                continue
            step = self._last_step_within(name, most)
            wrong = f"at the end of training, step {self._steps:,}, the source is read {amount.epochs:,.2f} times"
            share, asked = (
                epochs * len(self._sources[name].train) / (self._steps * self._batch_size)
                for epochs in (most, amount.epochs)
            )
            fewer = f"make at most {step:,} steps (train.steps), " if step else ""
            lower = f"lower its weights (it has {asked:.2%} of the run and may have {share:.2%})"
            raise DataError(f"data.mixture.{name}.epochs={most:g}: {wrong}; {lower}, {fewer}or give it more files")

    def _last_step_within(self, name: str, epochs: float) -> int:
        """The last step after which a source is read at most so often."""
        low, high = 0, self._steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.read_until(middle)[name].epochs <= epochs else (low, middle - 1)
        return low

    def _amount(self, name: str, rows: int) -> Amount:
        train = self._sources[name].train
        return Amount(round(rows * self._tokens_per_row(name)), rows / len(train))

    def _tokens_per_row(self, name: str) -> float:
        return self._config.train.seq_len * (1 - self._sources[name].train.padding)

    def _rows_by_weight(self, stage: WeightedStage) -> tuple[float, ...]:
        """Shares of rows, by source in the order of names, so that those of tokens are what the weights say."""
        weights = {name: stage.weights.get(name, 0.0) for name in self._names}
        if self._config.data.mixture_unit == "documents":
            weights = {name: weight * self._tokens_per_document(name) for name, weight in weights.items()}
        if any(self._sources[name].train.padding for name in self._names):
            weights = {name: weight / self._tokens_per_row(name) for name, weight in weights.items()}
        return tuple(weights.values())

    def _tokens_per_document(self, name: str) -> float:
        source = self._sources[name]
        if source.documents is None:
            wrong = f"the token files of data.mixture.{name} do not say how many documents they hold"
            raise DataError(f"data.mixture_unit=documents: {wrong}; give the weights as shares of tokens")
        return source.train.num_tokens / source.documents


def mixture_of(config: RunConfig, data: Data) -> Mixture | None:
    """The mixture of a run; None: it reads one source.

    Raises:
      DataError: as Mixture.
    """
    return Mixture(config, data.sources) if config.data.mixture else None


def order_of(config: RunConfig, data: Data) -> Order:
    """The rows that a run reads, one after the other."""
    mixture = mixture_of(config, data)
    if mixture is not None:
        return mixture.order()
    return EpochOrder(data.first.train, config.train.order_seed, rounds=config.train.shuffle_rounds)
