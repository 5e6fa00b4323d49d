"""`hybridnorm plan`: say whether a run fits on devices that are not here, by compiling its train step for them."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.arguments import sort
from hybridnorm_jax.config.yaml_files import read_file
from hybridnorm_jax.errors import UserError

FITS, DOES_NOT_FIT, UNKNOWN = 0, 3, 4
# Of a search: what is planned, and what is printed of it.
MOST, BEST = 30, 8

USAGE = """hybridnorm plan CONFIG [key=value ...] [--topology TOPOLOGY] [--json]
       hybridnorm plan CONFIG [key=value ...] --compare "key=value ..." "..."
       hybridnorm plan CONFIG [key=value ...] --search [--jobs N] [--most N]
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

--compare plans the configuration twice, with the settings of A and of B, and
prints both side by side: hybridnorm plan 1b2 --compare "" "model.remat=dots".
--search tries meshes, model.remat, train.grad_accumulation and
train.loss_chunk, and prints the best few. Both keep plans in the user's cache
folder, and find them there again.

Exit status: 0 it fits; 3 it does not fit; 4 that cannot be known; 2 an error
that you can mend, in one line."""


def run(arguments: Sequence[str]) -> int:
    """`hybridnorm plan CONFIG [key=value ...] [OPTION ...]`; returns the exit status."""
    check_syntax("plan", arguments)
    options = _parser().parse_intermixed_args(list(arguments))
    modes = {"--table": options.table, "--compare": options.compare, "--search": options.search}
    asked = [name for name, value in modes.items() if value]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: choose one of them")
    if not (options.search or options.compare) and (options.jobs, options.most) != (1, MOST):
        raise UserError("--jobs and --most belong to --search and --compare")
    return (
        {"--table": _table, "--compare": _compare, "--search": _search}[asked[0]](options) if asked else _one(options)
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm plan", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "settings", metavar="CONFIG, key=value", nargs="*", help="as for `hybridnorm train`, which lists the keys"
    )
    parser.add_argument("--topology", metavar="TOPOLOGY", help="devices to compile for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two settings, each the key=value of one plan in quotes"
    )
    parser.add_argument("--search", action="store_true", help="look for the settings that this topology does best")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="plans made at the same time (1)")
    parser.add_argument("--most", type=_count, default=MOST, metavar="N", help=f"plans that a search makes ({MOST})")
    parser.add_argument(
        "--table",
        metavar="FILE.md",
        help="write one row for each CONFIG into the table of this file; without CONFIG, for every configuration that "
        "comes with the package",
    )
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 to 9999")
    return int(text)


def _one(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_report
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    config = read_config(options.settings)
    result = plan(config, parse_topology(_topology(options)))
    print(json.dumps(plan_report.as_json(result), indent=2) if options.json else plan_report.text(result))
    return _status(result.fits)


def _topology(options: argparse.Namespace) -> str:
    """The topology that is asked for, or else that of the last configuration."""
    files = sort(options.settings).files
    if not files:
        raise UserError("plan: name a configuration, such as 151m; --help says more")
    return options.topology or meant_for(files[-1])


def _status(fits: bool | None) -> int:
    return {True: FITS, False: DOES_NOT_FIT, None: UNKNOWN}[fits]


def _compare(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning.compare import comparison
    from hybridnorm_jax.planning.stored_plans import plan_all
    from hybridnorm_jax.planning.topologies import parse_topology

    topology = parse_topology(_topology(options))
    settings = [(*options.settings, *_words(words)) for words in options.compare]
    reports = []
    for name, planned in zip("AB", plan_all(settings, topology, options.jobs), strict=True):
        if planned.report is None:
            raise UserError(f"--compare, {name}: {planned.refusal}")
        reports.append(planned.report)
    if options.json:
        print(json.dumps(dict(zip("AB", reports, strict=True)), indent=2))
    else:
        print(f"{topology}, {' '.join(options.settings)}\nA: {options.compare[0]}\nB: {options.compare[1]}\n")
        print(comparison(*reports))
    return max(_status(report["fits"]) for report in reports)


def _words(text: str) -> list[str]:
    """The settings of one plan of --compare, split as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--compare {text!r}: cannot be split into settings: {str(error).lower()}") from None


def _search(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning.search import search, table
    from hybridnorm_jax.planning.stored_plans import Planned
    from hybridnorm_jax.planning.topologies import parse_topology

    topology = parse_topology(_topology(options))
    if topology.is_simulated:
        raise UserError(f"--search: {topology} has no data sheet; name a TPU or a GPU such as h100:8")

    def tell(planned: Planned) -> None:
        outcome = planned.refusal or f"at most {planned.report['upper_bound_tokens_per_second'] or 0:,.0f} tokens/s"
        print(f"{' '.join(planned.setting)}: {outcome}", file=sys.stderr, flush=True)

    found = search(options.settings, topology, jobs=options.jobs, most=options.most, tell=tell)
    best = found.planned[:BEST]
    if not best:
        raise UserError(f"--search: nothing can be planned: {found.refused[0].refusal}")
    if options.json:
        print(json.dumps([{"setting": each.setting, **each.report} for each in best], indent=2))
    else:
        print(table(found, options.settings, BEST))
        end = "" if found.is_whole else f"; it ended after --most {options.most}, and goes on from there with more"
        print(f"{len(found.planned)} planned, {len(found.refused)} refused{end}")
    return _status(best[0].report["fits"])


def meant_for(file: Path) -> str:
    """The topology that a configuration's line `# Topology: ...` names.

    Raises:
      UserError: there is no such line, or the file cannot be read.
    """
    topology = topology_in(file)
    if topology is None:
        raise UserError(f"{file.name}: has no line such as `# Topology: v5p:4x4x4`; give --topology")
    return topology


def topology_in(file: Path) -> str | None:
    """The topology that a configuration's line `# Topology: ...` names; None: it has no such line.

    Raises:
      UserError: the file cannot be read.
    """
    line = re.search(r"^# Topology: (\S+)$", read_file(file), re.MULTILINE)
    return None if line is None else line[1]


def _table(options: argparse.Namespace) -> int:
    from hybridnorm_jax.planning import plan_table
    from hybridnorm_jax.planning.compilation import plan, read_config
    from hybridnorm_jax.planning.topologies import parse_topology

    named, overrides = sort(options.settings)
    if overrides or options.json:
        raise UserError("--table takes configurations as they are: no key=value or --json")
    file = Path(options.table)
    # A configuration without a topology, such as study_gpu, says how another one is trained.
    shipped = [named_configurations.find(name) for name in named_configurations.names()]
    files = named or [each for each in shipped if topology_in(each) is not None]
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
