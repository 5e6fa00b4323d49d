"""`hybridnorm plan`: say whether a run fits on devices that are not here, by compiling its train step for them."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.arguments import sort
from hybridnorm_jax.errors import UserError

FITS, DOES_NOT_FIT, UNKNOWN = 0, 3, 4

USAGE = """hybridnorm plan CONFIG [key=value ...] [--topology TOPOLOGY] [--json]
       hybridnorm plan --table FILE.md [--topology TOPOLOGY] [CONFIG ...]"""
DESCRIPTION = """Compiles the train step of a run for devices that nobody has to own, says
whether it fits, and counts its FLOPs, bytes of memory and bytes sent.

TOPOLOGY is one of
  v5e:4x8, v6e:16x16, v5p:4x4x8  one slice; needs the extra tpu, but no TPU
  2xv6e:16x16                    two slices; set mesh.replica
  h100:8, 2xh100:8               one node of GPUs, two nodes; needs the extra
                                 plan-gpu, but no GPU (a100, h100, h200, b200)
  gpu:8x80GB                     a node of any GPUs. The step is compiled for
                                 simulated CPU devices: whether it fits stays
                                 unknown.
Without --topology it is the one in the line `# Topology: v5p:4x4x4` of the
configuration.
No data is read, so data.files may be missing.

Exit status: 0 it fits; 3 it does not fit; 4 that cannot be known; 2 an error
that you can mend, in one line."""


def run(arguments: Sequence[str]) -> int:
    """`hybridnorm plan CONFIG [key=value ...] [OPTION ...]`; returns the exit status."""
    check_syntax("plan", arguments)
    options = _parser().parse_intermixed_args(list(arguments))
    return _table(options) if options.table else _one(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm plan", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "settings", metavar="CONFIG, key=value", nargs="*", help="as for `hybridnorm train`, which lists the keys"
    )
    parser.add_argument("--topology", metavar="TOPOLOGY", help="devices to compile for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    parser.add_argument(
        "--table",
        metavar="FILE.md",
        help="write one row for each CONFIG into the table of this file; without CONFIG, for every configuration that "
        "comes with the package",
    )
    return parser


def _one(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_report
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    files = sort(options.settings).files
    if not files:
        raise UserError("plan: name a configuration, such as 151m; --help says more")
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
        raise UserError(f"{file.name}: has no line such as `# Topology: v5p:4x4x4`; give --topology")
    return line[1]


def _table(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_table
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    named, overrides = sort(options.settings)
    if overrides or options.json:
        raise UserError("--table takes configurations as they are: no key=value or --json")
    file = Path(options.table)
    files = named or [named_configurations.find(name) for name in named_configurations.names()]
    plan_table.read_table(file)  # what is wrong with it is said now, not after the first compilation
    worst = FITS
    for config in files:
        topology = parse_topology(options.topology or meant_for(config))
        result = plan(read_config([str(config)]), topology)
        rows = plan_table.read_table(file)
        row = plan_table.table_row(config.stem, result)
        rows[plan_table.row_name(config.stem, str(topology))] = row
        plan_table.write_table(file, rows)
        print(" | ".join(row.values()), flush=True)
        worst = worst if result.fits else max(worst, DOES_NOT_FIT)
    return worst
