"""`hybridnorm runs compare`: in what runs differ."""

import json
import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.commands.runs import loss_text, table
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.resume_keys import decides_trajectory
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.run_differences import (
    ComparedRun,
    Difference,
    data_differences,
    environment_differences,
    key_differences,
    loss_difference,
    plugin_differences,
    read_run,
)

USAGE = "hybridnorm runs compare RUN RUN [RUN ...] [--json]"
DESCRIPTION = """In what runs differ: keys (* decides the training; the others say where it runs
and what it reports), data, plugins, the first step at which their losses are
not the same numbers, newest scores, versions and devices."""
MOST_RUNS = len(string.ascii_uppercase)
LONGEST_VALUE = 60


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm runs compare RUN RUN [RUN ...]`."""
    check_syntax("runs compare", arguments)
    parser = ArgumentParser("hybridnorm runs compare", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the directory of a run")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    asked = parser.parse_args(list(arguments))
    if not 2 <= len(asked.runs) <= MOST_RUNS:
        raise UserError(f"runs compare: {len(asked.runs)} run(s); name 2 to {MOST_RUNS} of them")
    runs = [read_run(path) for path in asked.runs]
    print(json.dumps(_as_json(runs), indent=2) if asked.json else "\n".join(_report(runs)))


def _report(runs: Sequence[ComparedRun]) -> Iterator[str]:
    letters = string.ascii_uppercase[: len(runs)]
    for letter, one in zip(letters, runs, strict=True):
        status, newest = one.status, one.status.newest
        why = f" ({status.why})" if status.why else ""
        step = f"{newest.step or 0:,} of {status.steps or 0:,}"
        yield f"{letter}  {one.path}: {status.scheme}, {status.status}{why}, step {step}"
    yield "\nKeys (* decides the training)"
    yield from _rows(letters, key_differences(runs), "the same in all", _marked, _shown)
    yield "\nData"
    yield from _rows(letters, data_differences(runs), "the same files", None, _file)
    yield "\nPlugins"
    yield from _rows(letters, plugin_differences(runs), "the same", None, lambda digest: digest[:12])
    yield "\nTraining loss"
    yield from (f"  {line}" for line in _loss_lines(letters, runs))
    yield "\nNewest scores"
    names = dict.fromkeys(name for one in runs for name in one.scores)
    scores = [Difference(name, [_score(one, name) for one in runs]) for name in names]
    yield from _rows(letters, scores, "none", None, str)
    yield "\nEnvironment"
    yield from _rows(letters, environment_differences(runs), "the same", None, str)


def _rows(
    letters: str,
    differences: Sequence[Difference] | None,
    otherwise: str,
    named: Callable[[str], str] | None,
    shown: Callable[[Any], str],
) -> Iterator[str]:
    """A table of the differences: one row each, one column for each run."""
    if not differences:
        yield "  unknown: not all of these runs say it" if differences is None else f"  {otherwise}"
        return
    rows = [
        [
            one.name if named is None else named(one.name),
            *("-" if value is None else shown(value) for value in one.values),
        ]
        for one in differences
    ]
    yield from (f"  {line}".rstrip() for line in table(["", *letters], rows, right=set()).split("\n"))


def _marked(name: str) -> str:
    return f"{'*' if decides_trajectory(name) else ' '} {name}"


def _shown(value: Any) -> str:
    text = spelled(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."


def _file(identity: tuple[int, str]) -> str:
    size, digest = identity
    return f"{size:,} bytes, {digest[:12]}"


def _score(one: ComparedRun, name: str) -> str | None:
    return None if name not in one.scores else f"{loss_text(one.scores[name])} (step {one.scored[name]:,})"


def _loss_lines(letters: str, runs: Sequence[ComparedRun]) -> Iterator[str]:
    for letter, other in zip(letters[1:], runs[1:], strict=True):
        found = loss_difference(runs[0], other)
        pair = f"{letters[0]} and {letter}"
        if not found.compared:
            yield f"{pair}: have no step in common"
        elif found.first is None:
            yield f"{pair}: the same numbers in all {found.compared:,} steps that both have"
        else:
            yield f"{pair}: differ first at step {found.first:,}: {found.before!r} and {found.now!r}"


def _as_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    parts = {"data": data_differences(runs), "plugins": plugin_differences(runs)}
    parts["environment"] = environment_differences(runs)
    return {
        "runs": [one.status.as_json() | {"scores": _finite(one.scores), "scored_step": one.scored} for one in runs],
        "keys": [
            {"key": one.name, "decides_training": decides_trajectory(one.name), "values": one.values}
            for one in key_differences(runs)
        ],
        **{
            name: None if found is None else [{"name": one.name, "values": one.values} for one in found]
            for name, found in parts.items()
        },
        "losses": [_finite(loss_difference(runs[0], other)._asdict()) for other in runs[1:]],
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Null for what JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
