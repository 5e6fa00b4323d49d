"""Plans of many settings, each made in a process of its own, several at a time, and kept on disk.

A process per plan because JAX gives one process the devices of one topology. A plan is found again by what decides it:
the configuration, the sources of its plugins, the topology, the share of a GPU's memory, the versions of JAX and the
compilers, and this package's own code.
"""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.config.plugins import plugins_of
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError, first_line
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.planning.plan_report import versions
from hybridnorm_jax.planning.topologies import Topology, memory_fraction
from hybridnorm_jax.whole_files import user_cache_folder, write_whole

PACKAGE = Path(__file__).parents[1]
# Of a few kilobytes each.
MOST_KEPT = 5000
# Exit statuses of `hybridnorm plan` with a report: it fits, does not, or that is unknown.
_WITH_REPORT = (0, 3, 4)


class Planned(NamedTuple):
    """What became of one setting.

    Attributes:
      setting: arguments of `hybridnorm plan`.
      report: as plan_report.as_json; None where the setting is refused.
      refusal: why, in one line.
    """

    setting: tuple[str, ...]
    report: dict[str, Any] | None
    refusal: str | None


def plan_all(settings: Iterable[Sequence[str]], topology: Topology, jobs: int) -> Iterator[Planned]:
    """Plan every setting, at most `jobs` at once; in the order of the settings.

    Args:
      settings: arguments such as ("1b2", "model.remat=full").
    """
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(lambda setting: plan_one(tuple(setting), topology), settings)


def plan_one(setting: tuple[str, ...], topology: Topology) -> Planned:
    """The plan of one setting, from disk where it is there."""
    try:
        config = read_config(setting)
    except ConfigError as error:
        return Planned(setting, None, str(error))
    folder = directory()
    file = None if folder is None else folder / f"{identity(config, topology)}.json"
    if file is not None and file.exists():
        return Planned(setting, json.loads(file.read_text(encoding="utf-8")), None)
    line = [sys.executable, "-m", "hybridnorm_jax", "plan", *setting, "--topology", str(topology), "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in _WITH_REPORT:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Planned(setting, None, said[-1].removeprefix("error: "))
    if file is not None:
        _keep(file, done.stdout)
    return Planned(setting, json.loads(done.stdout), None)


def directory() -> Path | None:
    """Where plans are kept: hybridnorm_jax/plans in the user's cache folder; None where the user has none."""
    root = user_cache_folder()
    return None if root is None else root / "plans"


def identity(config: RunConfig, topology: Topology) -> str:
    """A digest of all that decides a plan; the name of the run does not."""
    settings = dataclasses.asdict(config)
    settings.pop("run")
    settings["plugins"] = [plugin.digest for plugin in plugins_of(config.run.plugins)]
    settings["mesh"] |= mesh_sizes(config, topology)
    decides = [settings, str(topology), memory_fraction() if topology.is_gpu else None, versions(), _code()]
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:32]


def mesh_sizes(config: RunConfig, topology: Topology) -> dict[str, int]:
    """The sizes of the mesh on these devices, with what -1 stands for."""
    sizes = config.mesh.sizes
    given = math.prod(size for size in sizes.values() if size > 0)
    return {axis: size if size > 0 else topology.size // given for axis, size in sizes.items()}


@cache
def _code() -> str:
    """A digest of this package's code."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _keep(file: Path, text: str) -> None:
    """Write a plan and remove the oldest of too many; a folder that cannot be written is done without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text, concurrent=True)
        kept = sorted(file.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        print(f"plans are not kept: {first_line(error)}", file=sys.stderr)
