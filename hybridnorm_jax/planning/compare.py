"""Two settings side by side: what each costs, and their ratio."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hybridnorm_jax.planning.model_parts import PARTS
from hybridnorm_jax.planning.topologies import GIB

WIDTH = 18  # one more than the longest name of a policy of model.remat


class Line(NamedTuple):
    """One number of a plan's JSON.

    Attributes:
      name: what it is called, with its unit.
      of: report -> the number; None where it is not known.
    """

    name: str
    of: Callable[[dict[str, Any]], float | None]


def comparison(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Both plans (plan_report.as_json) as a table: A, B, and B / A."""
    rows = [f"{'':<36}{'A':>{WIDTH}}{'B':>{WIDTH}}{'B / A':>10}"]
    rows.append(f"{'fits':<36}{_yes(first['fits']):>{WIDTH}}{_yes(second['fits']):>{WIDTH}}")
    rows.append(f"{'remat':<36}{first['remat']:>{WIDTH}}{second['remat']:>{WIDTH}}")
    for line in _lines(first, second):
        one, other = line.of(first), line.of(second)
        if not one and not other:
            continue
        ratio = f"{other / one:.3f}" if one and other is not None else ""
        rows.append(f"{line.name:<36}{_text(one):>{WIDTH}}{_text(other):>{WIDTH}}{ratio:>10}")
    bounds = [str(report["bound_by"] or "unknown") for report in (first, second)]
    rows.append(f"{'bound by':<36}{bounds[0]:>{WIDTH}}{bounds[1]:>{WIDTH}}")
    return "\n".join(rows)


def _yes(fits: bool | None) -> str:
    return "unknown" if fits is None else "yes" if fits else "no"


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:,.5g}" if number < 1e5 else f"{number:,.0f}"


def _lines(first: dict[str, Any], second: dict[str, Any]) -> list[Line]:
    lines = [
        Line("parameters", lambda report: report["parameters"]),
        Line("peak memory, GiB", _memory("peak")),
        Line("arguments, GiB", _memory("arguments")),
        Line("temporaries, GiB", _memory("temporaries")),
    ]
    for column, unit, scale in (
        ("product_flops", "products, TFLOP", 1e12),
        ("kernel_flops", "kernels, TFLOP", 1e12),
        ("memory_bytes", "memory, GiB", GIB),
        ("sent_bytes", "sent, GiB", GIB),
    ):
        lines += [Line(f"{unit}: {part}", _count(column, part, scale)) for part in PARTS]
        lines.append(Line(f"{unit}: all", _count(column, None, scale)))
    kinds = {kind for report in (first, second) for kind in report["collectives_per_step_and_device"] or ()}
    lines += [Line(f"{kind}, MB", _collective(kind)) for kind in sorted(kinds)]
    networks = [name for report in (first, second) for name in report["roofline_seconds"] or ()]
    lines += [Line(f"{name} at peak, ms", _roofline(name)) for name in dict.fromkeys(networks)]
    lines.append(Line("tokens/s, UPPER BOUND", lambda report: report["upper_bound_tokens_per_second"]))
    lines.append(Line("MFU in %, UPPER BOUND", lambda report: _scaled(report["upper_bound_mfu"], 0.01)))
    return lines


def _scaled(number: float | None, scale: float) -> float | None:
    return None if number is None else number / scale


def _memory(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: _scaled((report["memory_per_device"] or {}).get(name), GIB)


def _count(column: str, part: str | None, scale: float) -> Callable[[dict[str, Any]], float | None]:
    """Of one part, or of all."""

    def of(report: dict[str, Any]) -> float | None:
        counts = report["counts_per_step_and_device"]
        if counts is None:
            return None
        return (sum(counts[column].values()) if part is None else counts[column][part]) / scale

    return of


def _collective(kind: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: (report["collectives_per_step_and_device"] or {}).get(kind, {}).get("bytes", 0) / 1e6


def _roofline(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda report: _scaled((report["roofline_seconds"] or {}).get(name), 1e-3)
