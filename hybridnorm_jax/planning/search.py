"""The settings that a topology does best for a run: meshes, remat, microbatches and loss chunks, planned and ranked."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.config import REMAT_POLICIES
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.planning.stored_plans import Planned, identity, mesh_sizes, plan_all
from hybridnorm_jax.planning.topologies import GIB, Topology

CHUNKS = (256, 512, 1024, 2048)
ACCUMULATIONS = (1, 2, 4, 8, 16, 32)
POWERS = tuple(2**power for power in range(9))
MOST_TENSOR, MOST_EXPERT = 8, 64

# What is changed, as key=value.
Change = tuple[str, ...]


class Best(NamedTuple):
    """What a search found.

    Attributes:
      planned: every setting that was planned, best first, those that do not fit behind those that do.
      refused: those that no run could have, or that failed.
      is_whole: False where `most` ended the search before it had tried all that it would.
    """

    planned: list[Planned]
    refused: list[Planned]
    is_whole: bool


def search(base: Sequence[str], topology: Topology, *, jobs: int, most: int, tell: Callable[[Planned], None]) -> Best:
    """Change one thing after the other, each to the best of its candidates, until nothing gets better.

    Better is what fits, and then what the roofline lets be faster: the longest of arithmetic, memory and networks at
    their peak, and between equals the sum of these. What overlaps badly or runs below its peak is not seen. Each policy
    of model.remat is tried with the fewest microbatches with which it fits.

    Args:
      base: arguments of `hybridnorm plan`, from which the search starts.
      jobs: processes at once.
      most: settings that are planned at most.
      tell: is called with every plan.

    Raises:
      ConfigError: `base` is no configuration.
    """
    read_config(base)
    plans = _Plans(tuple(base), topology, jobs, most, tell)
    plans.add([()])
    best: Change | None = None
    while best != plans.best and not plans.are_enough:
        best = plans.best
        plans.add(_meshes(plans.best_config, topology))
        _add_policies(plans)
        plans.add(_chunks(plans.best_config))
    ranked = sorted(plans.known.values(), key=_cost)
    return Best(
        planned=[each for each in ranked if each.report is not None],
        refused=[each for each in ranked if each.report is None],
        is_whole=not plans.are_enough,
    )


class _Plans:
    """All that was planned so far; `known` by what a setting means."""

    def __init__(
        self, base: tuple[str, ...], topology: Topology, jobs: int, most: int, tell: Callable[[Planned], None]
    ):
        self.topology = topology
        self.known: dict[str, Planned] = {}
        self._base, self._jobs, self._most, self._tell = base, jobs, most, tell

    @property
    def best(self) -> Change:
        """What the best setting changes."""
        return min(self.known.values(), key=_cost).setting[len(self._base) :]

    @property
    def best_config(self) -> RunConfig:
        """The best setting."""
        return read_config((*self._base, *self.best))

    @property
    def are_enough(self) -> bool:
        """Whether no more may be planned."""
        return len(self.known) >= self._most

    def add(self, changes: Iterable[Change]) -> list[Planned]:
        """Plan the best setting with each of these changes; returns what is known of those that could be planned."""
        settings: dict[str, tuple[str, ...]] = {}
        before = self.best if self.known else ()
        for change in changes:
            setting = (*self._base, *_merged(before, change))
            settings.setdefault(_identity(setting, self.topology), setting)
        new = [name for name in settings if name not in self.known][: self._most - len(self.known)]
        found = plan_all((settings[name] for name in new), self.topology, self._jobs)
        for name, each in zip(new, found, strict=True):
            self.known[name] = each
            self._tell(each)
        return [self.known[name] for name in settings if name in self.known]


def _add_policies(plans: _Plans) -> None:
    """Every policy of model.remat with one microbatch, then those that do not fit with two, and so on."""
    waiting = list(REMAT_POLICIES)
    config, before = plans.best_config, plans.best
    for count in _accumulations(config, plans.topology):
        pairs = [_merged(before, (f"model.remat={policy}", f"train.grad_accumulation={count}")) for policy in waiting]
        found = plans.add(pairs)
        waiting = [policy for policy, each in zip(waiting, found, strict=False) if _cost(each)[0] != 0]
        if not waiting or plans.are_enough:
            return


def _identity(setting: tuple[str, ...], topology: Topology) -> str:
    """The same for settings that mean the same; of those that no run could have, their own words."""
    try:
        return identity(read_config(setting), topology)
    except ConfigError:
        return " ".join(setting)


def _merged(before: Change, change: Change) -> Change:
    """Both changes; of the same key the later one."""
    values = dict(each.split("=", 1) for each in (*before, *change))
    return tuple(f"{key}={values[key]}" for key in sorted(values))


def _cost(planned: Planned) -> tuple[float, ...]:
    """What is compared, least first."""
    report = planned.report
    if report is None or report["roofline_seconds"] is None or report["memory_per_device"] is None:
        return (2, 0, 0)
    seconds = report["roofline_seconds"].values()
    if not report["fits"]:
        return (1, report["memory_per_device"]["peak"], 0)
    return (0, max(seconds), sum(seconds))


# ---- candidates


def _parts(config: RunConfig, topology: Topology) -> int:
    """Into how many shares the mesh splits a batch."""
    sizes = mesh_sizes(config, topology)
    return sizes["replica"] * sizes["data"] * sizes["fsdp"] * sizes["expert"]


def _meshes(config: RunConfig, topology: Topology) -> Iterator[Change]:
    """Experts split, tensors split, and of what is left all, eight or none with shared parameters (fsdp)."""
    model, sizes = config.model, config.mesh.sizes
    replicas = topology.slices if topology.slices > 1 else max(sizes["replica"], 1)
    devices = topology.size // (replicas * max(sizes["context"], 1))
    experts = [each for each in POWERS if each <= MOST_EXPERT and model.num_experts and model.num_experts % each == 0]
    tensors = [each for each in POWERS if each <= MOST_TENSOR and model.num_kv_heads % each == 0]
    for tensor, expert in itertools.product(tensors, experts or [1]):
        rest, left_over = divmod(devices, tensor * expert)
        if left_over or not rest or config.microbatch_size % (replicas * rest * expert):
            continue
        for fsdp in dict.fromkeys((rest, 8, 1)):
            if rest % fsdp == 0:
                axes = {"replica": replicas, "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "expert": expert}
                yield tuple(f"mesh.{axis}={size}" for axis, size in axes.items())


def _accumulations(config: RunConfig, topology: Topology) -> list[int]:
    """Numbers of microbatches whose sequences the mesh can split."""
    parts = _parts(config, topology)
    return [count for count in ACCUMULATIONS if config.train.batch_size % (count * parts) == 0]


def _chunks(config: RunConfig) -> Iterator[Change]:
    yield ("train.loss_chunk=null",)
    for chunk in CHUNKS:
        if config.train.seq_len % chunk == 0 and chunk < config.train.seq_len:
            yield (f"train.loss_chunk={chunk}",)


# ---- the report


def table(found: Best, base: Sequence[str], number: int) -> str:
    """The best few, one a line."""
    rows = [f"{'fits':<8}{'peak GiB':>10}{'bound by':>12}{'tokens/s <=':>14}{'MFU <=':>8}  {'remat':<18}setting"]
    rows += [_row(each, base) for each in found.planned[:number]]
    return "\n".join(rows)


def _row(planned: Planned, base: Sequence[str]) -> str:
    report: dict[str, Any] = planned.report or {}
    memory, tokens = report["memory_per_device"], report["upper_bound_tokens_per_second"]
    fits = {True: "yes", False: "no", None: "unknown"}[report["fits"]]
    peak = "-" if memory is None else f"{memory['peak'] / GIB:.4g}"
    mfu = "-" if report["upper_bound_mfu"] is None else f"{report['upper_bound_mfu']:.1%}"
    speed = "-" if tokens is None else f"{tokens:,.0f}"
    changed = " ".join(planned.setting[len(base) :]) or "as it is"
    return f"{fits:<8}{peak:>10}{report['bound_by'] or '-':>12}{speed:>14}{mfu:>8}  {report['remat']:<18}{changed}"
