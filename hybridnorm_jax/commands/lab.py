"""What a norm placement does to signal, gradients and loss, and honest comparisons of placements.

  hybridnorm lab signal  [CONFIG] [schemes=[pre,post]] [depths=[8,32]] [initializers=[normal]] [...]
  hybridnorm lab compare [CONFIG] [schemes=[pre,post]] [seeds=[0,1,2]] [learning_rates=[1e-3]] [...]
  hybridnorm lab report  DIR [baseline=pre]

signal measures models at initialization: table, JSON, figures. compare trains every combination on the same data, skips
what is finished and goes on with what is not; report makes one page of its directory. Without CONFIG it is
the configuration `lab`. Other keys are those of `hybridnorm train`. docs/lab.md says what each measure is.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from hybridnorm_jax.commands.program import again, wants_help
from hybridnorm_jax.config.yaml_files import default, show
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.mesh.processes import Processes, check_alike

SIGNAL_USAGE = """usage: hybridnorm lab signal [CONFIG ...] [key=value ...]

Measures freshly initialized models on random tokens, without training. Lists are written [a,b].
"""
COMPARE_USAGE = """usage: hybridnorm lab compare [CONFIG ...] [key=value ...] [--emit-jobs=KIND]

Trains every combination, one after another. The same command again skips what has a result and resumes the rest; a
run that diverges is a result. Everything goes to run.dir/compare-NAME, or run.dir/run.name.
--emit-jobs=slurm (or jobset) writes a SLURM array (or a GKE JobSet) that trains each combination in a job of its own,
and trains nothing. --only=K trains the combination of this number, as those jobs do.
"""
REPORT_USAGE = """usage: hybridnorm lab report DIR [baseline=SCHEME]

Writes DIR/report.html (one file), report.md with figures/, and report.csv. Differences are to the baseline: without
the word pre, or the first scheme where there is no pre.
"""


def run(arguments: Sequence[str], processes: Processes) -> int | None:
    """`hybridnorm lab signal | compare | report`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.rstrip())
        return 0 if arguments else 2
    commands = {"signal": _signal, "compare": _compare, "report": _report}
    name, rest = arguments[0], list(arguments[1:])
    if name not in commands:
        raise UserError(f"{name}: no such command{did_you_mean(name, commands)}")
    commands[name](rest, processes)
    return None


def _signal(words: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import signal

    if wants_help(words):
        print(SIGNAL_USAGE + _keys(signal.SignalOptions))
        return
    signal.run(words)


def _compare(words: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab import compare, jobs

    if wants_help(words):
        print(COMPARE_USAGE + _keys(compare.CompareOptions))
        return
    emit, words = _option(words, "--emit-jobs")
    only, words = _option(words, "--only")
    if only is not None and not only.isdecimal():
        raise UserError(f"--only={only}: must be the number of a combination, from 0")
    asked = compare.comparison(words)
    if emit is not None:
        print(jobs.emit(asked, emit))
        return
    with processes.running(asked.configs[0].distributed):
        kept = [word for word in words if not word.startswith(("distributed.", "data.cache_dir="))]
        check_alike({"the arguments": shlex.join([*kept, f"--only={only}"])})
        results = compare.compare(asked, None if only is None else int(only))
    if processes.number == 0:
        print(f"\n{compare.table(asked, results)}" if only is None else "")
        print(f"\nNext: {again(['lab', 'report', asked.directory])}")


def _report(words: list[str], processes: Processes) -> None:
    from hybridnorm_jax.lab.report import write_report

    if wants_help(words):
        print(REPORT_USAGE)
        return
    baseline, words = _option(words, "baseline")
    if len(words) != 1:
        raise UserError("report needs one directory of runs, such as runs/compare-lab; --help says more")
    print(write_report(words[0], baseline))


def _option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value in the last word `name=value`, and all other words."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    if name in words:
        raise UserError(f"{name}: needs a value, {name}=...")
    return values[-1] if values else None, [word for word in words if not word.startswith(f"{name}=")]


def _keys(options: type) -> str:
    """A line for every key of a dataclass of options."""
    fields = dataclasses.fields(options)
    rows = [(f"  {field.name}={show(default(field))}", field.metadata["meaning"]) for field in fields]
    width = max(len(row) for row, _ in rows)
    return (
        "\n" + "\n".join(f"{row:{width}}  {meaning}" for row, meaning in rows) + "\nand every key of `hybridnorm train`"
    )
