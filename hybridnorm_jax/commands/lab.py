"""`hybridnorm lab ...`: what a norm placement does, honest comparisons of placements, and the papers' claims."""

import dataclasses
import re
import shlex
import textwrap
from collections.abc import Sequence

from hybridnorm_jax.commands.program import again, subcommand, wants_help
from hybridnorm_jax.commands.program_cache import keep_programs
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.key_lookup import default
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import as_arguments, import_plugins
from hybridnorm_jax.config.yaml_files import named_plugins
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.mesh.processes import Processes, check_alike
from hybridnorm_jax.streams import sturdy_streams

USAGE = """usage: hybridnorm lab signal  [CONFIG ...] [key=value ...]
       hybridnorm lab widths  [CONFIG ...] [key=value ...]
       hybridnorm lab compare [CONFIG ...] [key=value ...]
       hybridnorm lab plan    [CONFIG ...] [key=value ...]
       hybridnorm lab report  DIR [baseline=SCHEME] [run.plugins=[...]]
                              [--speed]
       hybridnorm lab claims  [ID ...] [out=DIR]

signal   measures models at initialization and writes a table, JSON and figures
widths   trains models of several widths for a few steps, with the rules of muP
         and without, and says whether their activations depend on the width
compare  trains every combination of schemes, seeds and learning rates, or
         searches each scheme's own rate first
plan     says how long that will take here
report   writes one page about the runs that compare has trained
claims   measures what the papers claim, and says what held

Without CONFIG it is the configuration `lab`.
`hybridnorm lab compare --help` says more about compare."""
SIGNAL_USAGE = """usage: hybridnorm lab signal [CONFIG ...] [key=value ...]

Measures freshly initialized models on random tokens, without training. Needs
the extra lab.

  hybridnorm lab signal 'schemes=[pre, post]' 'depths=[8, 32]' model.d_model=256

Its own keys are these. All other keys are those of `hybridnorm train`.
"""
WIDTHS_USAGE = """usage: hybridnorm lab widths [CONFIG ...] [key=value ...]

The coordinate check of muP (docs/widths.md): trains models of several widths
for a few steps on random tokens, at one learning rate, with model.base_width
and without, on one device. Prints the size of the stream at each width, and
writes widths.json.

  hybridnorm lab widths 'schemes=[pre, span]' 'widths=[32, 128]'

A model has the heads and the shape of CONFIG at its own width, and 3 layers, a
constant learning rate of 0.01 and no warm-up unless other keys are given.

Its own keys are these. All other keys are those of `hybridnorm train`.
"""
COMPARE_USAGE = """usage: hybridnorm lab compare [CONFIG ...] [key=value ...]
                              [--emit-jobs=KIND | --only=K]

Trains every combination, one after another. The same command again skips what
has a result and resumes the rest. A run that diverges is a result. Everything
goes to run.dir/compare-CONFIG (with a sweep compare-CONFIG-sweep), or to
run.dir/run.name where run.name is given.

  hybridnorm lab compare 'schemes=[pre, span]' 'seeds=[0, 1]' train.steps=200

With sweep=[...] it first searches the best learning rate of each scheme, with
seeds of its own, and then trains all seeds at that rate:

  hybridnorm lab compare 'schemes=[pre, span]' 'sweep=[1e-3, 2e-3, 4e-3]'

With together=N it trains up to N runs of a scheme at once, on a GPU or TPU that
a small model leaves mostly idle.

--emit-jobs=slurm    train nothing; write a SLURM array of one job a combination
                     or, with a sweep, a scheme
--emit-jobs=jobset   train nothing; write the same for GKE, as a JobSet
--only=K             train the job number K only, as these jobs do; from 0

Its own keys are these. All other keys are those of `hybridnorm train`.
"""
REPORT_USAGE = """usage: hybridnorm lab report DIR [baseline=SCHEME] [run.plugins=[...]] [--speed]

Writes DIR/report.html (one file), DIR/report.md with DIR/figures, every run's
numbers as DIR/report.csv, and each table as CSV, JSON and LaTeX to DIR/tables.
Needs the extra lab.

baseline=SCHEME    what differences are to; default: pre, or the first scheme
                   where there is no pre
run.plugins=[...]  plugins of the runs, which are imported only if you name them
--speed            also show tokens per second, which say little where runs
                   were made beside other work"""

PLAN_USAGE = """usage: hybridnorm lab plan [CONFIG ...] [key=value ...]

Says how long `hybridnorm lab compare` with the same arguments will take here:
compiles each scheme and measures a few steps of it. Trains nothing.

  hybridnorm lab plan 'schemes=[pre, span]' 'sweep=[1e-3, 2e-3, 4e-3]'
"""

CLAIMS_USAGE = """usage: hybridnorm lab claims [ID ...] [out=DIR]

Measures the papers' claims that take seconds to two minutes each, or those
named, and prints a row for each: claim, verdict, number. Of a claim that takes
longer it prints what was found before, and the commands that test it. Writes
claims.json.

  hybridnorm lab claims theorem-2 lossless-rmsnorm

It takes one key:
"""


def run(arguments: Sequence[str], processes: Processes) -> int | None:
    """`hybridnorm lab signal | widths | compare | plan | report | claims`."""
    commands = {
        "signal": _signal,
        "widths": _widths,
        "compare": _compare,
        "plan": _plan,
        "report": _report,
        "claims": _claims,
    }
    name, rest = subcommand("lab", arguments, commands, USAGE), list(arguments[1:])
    if name is None:
        return 0 if arguments else 2
    check_syntax(f"lab {name}", rest)
    commands[name](rest, processes)
    return None


def _signal(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import signal_at_start

    if wants_help(arguments):
        print(SIGNAL_USAGE + _keys(signal_at_start.SignalOptions))
        return
    keep_programs(speaks=processes.number == 0)
    signal_at_start.run(arguments)


def _widths(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import width_check

    if wants_help(arguments):
        print(WIDTHS_USAGE + _keys(width_check.WidthOptions))
        return
    keep_programs(speaks=processes.number == 0)
    width_check.run(arguments)


def _compare(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import compare, compare_options, jobs

    if wants_help(arguments):
        print(COMPARE_USAGE + _keys(compare_options.CompareOptions))
        return
    emit, arguments = _option(arguments, "--emit-jobs")
    number, arguments = _option(arguments, "--only")
    if number is not None and re.fullmatch(r"\d{1,9}", number, re.ASCII) is None:
        raise UserError(f"--only={number}: must be the number of a combination, from 0")
    only = None if number is None else int(number)
    asked = compare_options.comparison(arguments)
    if emit is not None:
        print(jobs.emit(asked, emit))
        return
    with sturdy_streams(), processes.running(asked.configs[0].distributed):
        kept = [each for each in arguments if not each.startswith(("distributed.", "data.cache_dir="))]
        check_alike({"the arguments": shlex.join([*kept, f"--only={number}"])})
        keep_programs(speaks=processes.number == 0)
        runs = compare.compare(asked, only)
    if processes.number == 0:
        print("" if only is not None else f"\n{compare.table(asked, runs)}")
        needed = as_arguments(asked.configs[0].run.plugins)
        print(f"\nNext: {again(['lab', 'report', asked.directory, *needed])}")


def _plan(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import compare_options, expected_time

    if wants_help(arguments):
        print(PLAN_USAGE)
        return
    asked = compare_options.comparison(arguments)
    with sturdy_streams(), processes.running(asked.configs[0].distributed):
        keep_programs(speaks=processes.number == 0)
        measured = expected_time.expected(asked)
    if processes.number == 0:
        print(f"\n{expected_time.table(asked, measured)}")
        print(f"\nNext: {again(['lab', 'compare', *arguments])}")


def _report(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab.report import write_report

    if wants_help(arguments):
        print(REPORT_USAGE)
        return
    baseline, arguments = _option(arguments, "baseline")
    import_plugins(named_plugins(arguments))
    arguments = [argument for argument in arguments if not argument.startswith(f"{PLUGINS}=")]
    speed = "--speed" in arguments
    arguments = [argument for argument in arguments if argument != "--speed"]
    if len(arguments) != 1:
        raise UserError("lab report: name one directory of runs, such as runs/compare-lab; --help says more")
    page = write_report(arguments[0], baseline, speed=speed)
    print(f"{page}\n  as Markdown: {page.with_suffix('.md')}\n  every run's numbers: {page.with_suffix('.csv')}")
    print(f"  each table as CSV, JSON and LaTeX: {page.parent / 'tables'}")


def _claims(arguments: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab.claims import run

    if wants_help(arguments):
        print(CLAIMS_USAGE + _keys(run.ClaimOptions))
        return
    keep_programs(speaks=processes.number == 0)
    run.run(arguments)


def _option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value in the last argument `name=value`, and all other arguments."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    if name in arguments:
        raise UserError(f"{name}: needs a value, {name}=...")
    return values[-1] if values else None, [each for each in arguments if not each.startswith(f"{name}=")]


def _keys(options: type) -> str:
    """The fields of a dataclass of options as key=value with their meanings, in at most 80 columns."""
    lines = []
    for field in dataclasses.fields(options):
        lines.append(f"\n  {field.name}={spelled(default(field))}")
        lines += textwrap.wrap(field.metadata["meaning"], 80, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
