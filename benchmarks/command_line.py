"""What all benchmarks share: their options, the machine they ran on, and how a result is printed."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hybridnorm_jax.commands.huge_pages import begin_again_with_huge_pages
from hybridnorm_jax.commands.main import exit_status


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help is this description and its options; every benchmark has --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def positive(text: str) -> int:
    """The type of an option that is a number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Call main with the arguments of this process, and end it: with one line and status 2 for what a user can mend.

    Memory is as in `hybridnorm train`: on a CPU the process begins once more, with huge pages.
    """
    begin_again_with_huge_pages()
    sys.exit(exit_status(lambda: main(sys.argv[1:])))


def machine() -> dict[str, Any]:
    """What a result says of the machine it was measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "threads": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def machine_line(result: Mapping[str, Any]) -> str:
    """The machine of a result, for people."""
    return (
        f"{result['devices']} x {result['device']}, {result['threads']} threads, JAX {result['jax']}, "
        f"GLIBC_TUNABLES={result['glibc_tunables'] or 'unset'}"
    )


def print_result(result: Mapping[str, Any], report: Callable[[Mapping[str, Any]], str], *, as_json: bool) -> None:
    """Print a result as JSON, or as report writes it for people."""
    print(json.dumps(result, indent=2) if as_json else report(result))


def number_text(value: float | None) -> str:
    """A number for people."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
    return str(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first row its headings: the first column aligned at the left, the others at the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        line = f"  {first:<{widths[0]}}"
        for cell, width in zip(others, widths[1:], strict=True):
            line += f"  {cell:>{width}}"
        lines.append(line)
    return lines
