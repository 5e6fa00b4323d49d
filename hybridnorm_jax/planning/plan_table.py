"""Plans as rows of the table in docs/planning.md."""

import datetime
from pathlib import Path

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.compilation import Plan
from hybridnorm_jax.planning.plan_report import mesh_text, verdict, versions
from hybridnorm_jax.planning.topologies import GIB

COLUMNS = (
    "configuration",
    "topology",
    "mesh",
    "sequences",
    "peak",
    "usable",
    "fits",
    "TFLOP",
    "memory",
    "sent",
    "bound by",
    "at most tokens/s",
    "at most MFU",
    "compiled",
    "made",
)
BEGIN, END = "<!-- planning table: begin -->", "<!-- planning table: end -->"
UNKNOWN = "-"


def row_name(configuration: str, topology: str) -> str:
    """What a row is found by."""
    return f"{configuration} {topology}"


def table_row(name: str, plan: Plan) -> dict[str, str]:
    """The cells of COLUMNS for the configuration of this name; counts and memory are those of one device.

    Where something could not be counted, "> " says that a count is too small.
    """
    counts, found = plan.counts, plan.roofline
    accumulation = plan.accumulation
    sent = None if counts is None else sum(counts.sent_bytes.values()) / 1e9
    less = "> " if counts is not None and (counts.unknown_loops or counts.unknown_kernels) else ""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return {
        "configuration": name,
        "topology": str(plan.topology),
        "mesh": mesh_text(plan),
        "sequences": f"{accumulation} x {plan.microbatch}" if accumulation > 1 else str(plan.microbatch),
        "peak": _digits(None if plan.memory is None else plan.memory.peak / GIB),
        "usable": f"{plan.topology.hbm / GIB:.4g}",
        "fits": verdict(plan),
        "TFLOP": less + _digits(None if counts is None else counts.flops / 1e12),
        "memory": less + _digits(None if counts is None else counts.memory / GIB),
        "sent": _digits(sent),
        "bound by": UNKNOWN if found is None else found.bound,
        "at most tokens/s": _thousands(plan.most_tokens_per_second),
        "at most MFU": UNKNOWN if plan.most_mfu is None else f"{plan.most_mfu:.0%}",
        "compiled": f"{plan.compile_seconds:.0f} s",
        "made": f"{today}, {versions()}",
    }


def _digits(number: float | None) -> str:
    """Three digits, without an exponent: 0.0267, 14.3, 1,260."""
    if number is None or number < 1000:
        return UNKNOWN if number is None else f"{number:.3g}"
    return _thousands(number)


def _thousands(number: float | None) -> str:
    return UNKNOWN if number is None else f"{float(f'{number:.3g}'):,.0f}"


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """The rows of the table in this file: row_name -> column -> cell.

    Raises:
      UserError: there are no BEGIN and END marks, or the table has other columns.
    """
    lines = [line for line in _between_marks(file).splitlines() if line.startswith("|")]
    rows = {}
    for line in lines[2:]:  # below the headings and the rule
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(COLUMNS):
            raise UserError(f"{file}: a row of its table has {len(cells)} cells, not {len(COLUMNS)}: {line:.60}")
        row = dict(zip(COLUMNS, cells, strict=True))
        rows[row_name(row["configuration"], row["topology"])] = row
    return rows


def write_table(file: Path, rows: dict[str, dict[str, str]]) -> None:
    """Put these rows, sorted by name, between the marks of this file.

    Raises:
      UserError: there are no BEGIN and END marks.
    """
    inside = _between_marks(file)
    lines = ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in sorted(rows):
        cells = [f"`{rows[name][column]}`" if column == "topology" else rows[name][column] for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace(f"{BEGIN}{inside}{END}", f"{BEGIN}{table}{END}"), encoding="utf-8")


def _between_marks(file: Path) -> str:
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: must be a file with a table")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    _, begin, rest = content.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file}: needs the lines {BEGIN} and {END}, between which the table is written")
    return inside
