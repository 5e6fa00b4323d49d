"""Say whether a run fits on devices that are not here, by compiling its train step for them.

  hybridnorm plan CONFIG [key=value ...] [--topology v5p:4x4x4] [--json]
  hybridnorm plan --table docs/planning.md [CONFIG ...]

A topology is v5e:4x8, v6e:16x16, v5p:4x4x8, 2xv6e:16x16 (two slices; set mesh.replica) or gpu:8x80GB. A TPU's needs
`pip install libtpu`, no TPU. Without --topology it is the one in the file's line `# Topology: v5p:4x4x4`. Data is not
read, so data.files may be missing. A GPU's step is compiled for simulated CPU devices: whether it fits stays unknown.

Exit status: 0 it fits, 3 it does not fit, 4 that cannot be known, 2 after one line on standard error for wrong input.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.config import configurations
from hybridnorm_jax.config.arguments import sort
from hybridnorm_jax.errors import UserError

FITS, DOES_NOT_FIT, UNKNOWN = 0, 3, 4


def run(arguments: Sequence[str]) -> int:
    """`hybridnorm plan CONFIG [key=value ...] [OPTION ...]`; returns the exit status."""
    parser = ArgumentParser(prog="hybridnorm plan", description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("settings", metavar="CONFIG key=value", nargs="*", help="as for `hybridnorm train`")
    parser.add_argument("--topology", metavar="TOPOLOGY", help="the devices to compile for")
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else on standard output")
    table = "write a row into this file's table for each configuration named, by default all that come with the package"
    parser.add_argument("--table", metavar="FILE.md", help=table)
    options = parser.parse_intermixed_args(list(arguments))
    return _table(options) if options.table else _one(options)


def _one(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_report
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    files = sort(options.settings).files
    if not files:
        raise UserError("name a configuration, such as 151m; --help says more")
    config = read_config(options.settings)
    result = plan(config, parse_topology(options.topology or meant_for(files[-1])))
    print(json.dumps(plan_report.as_json(result), indent=2) if options.json else plan_report.text(result))
    return {True: FITS, False: DOES_NOT_FIT, None: UNKNOWN}[result.fits]


def meant_for(file: Path) -> str:
    """The topology that a configuration's line `# Topology: ...` names.

    Raises:
      UserError: there is no such line.
    """
    line = re.search(r"^# Topology: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    if line is None:
        raise UserError(f"{file}: has no line such as `# Topology: v5p:4x4x4`; give --topology")
    return line[1]


def _table(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_report
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    named, overrides = sort(options.settings)
    if overrides or options.topology or options.json:
        raise UserError("--table takes configurations as they are: no key=value, --topology or --json")
    file = Path(options.table)
    files = named or [configurations.find(name) for name in configurations.names()]
    plan_report.read_table(file)  # what is wrong with it is said now, not after the first compilation
    worst = FITS
    for config in files:
        result = plan(read_config([str(config)]), parse_topology(meant_for(config)))
        _, rows = plan_report.read_table(file)
        rows[config.stem] = plan_report.table_row(config.stem, result)
        plan_report.write_table(file, rows)
        print(" | ".join(rows[config.stem].values()), flush=True)
        worst = worst if result.fits else max(worst, DOES_NOT_FIT)
    return worst
