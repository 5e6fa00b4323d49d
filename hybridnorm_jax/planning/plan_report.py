"""A Plan as text, as JSON, and as a row of the table in docs/planning.md."""

import dataclasses
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.compilation import Plan
from hybridnorm_jax.planning.topologies import CHIPS, GIB

FLOPS_NOTE = "the compiler counts a loop once, however often it runs, and kernels not at all"
COLLECTIVES_NOTE = "each counts as often as its loop runs; its bytes are the larger of what goes in and what comes out"
SIMULATED_NOTE = (
    "CPU devices stand for the GPUs. Which device holds what is exact. Temporaries, code and the choice of collectives "
    "are the CPU compiler's, with the attention and experts named above; it computes some bfloat16 in float32"
)

COLUMNS = (
    "configuration",
    "topology",
    "mesh",
    "parameters",
    "sequences",
    "arguments",
    "temporaries",
    "peak",
    "usable",
    "fits",
    "model PFLOP",
    "sent",
    "compiled",
)
BEGIN, END = "<!-- planning table: begin -->", "<!-- planning table: end -->"


def versions() -> str:
    """The versions of JAX and of the TPU compiler that are installed."""
    libtpu = importlib.metadata.version("libtpu") if importlib.util.find_spec("libtpu") else "none"
    return f"JAX {importlib.metadata.version('jax')}, libtpu {libtpu}"


def verdict(plan: Plan) -> str:
    """Whether it fits: yes, no or unknown."""
    if plan.fits is None:
        return "unknown"
    return "yes" if plan.fits else "no"


class Row(NamedTuple):
    """A line of the report; without a name it belongs to the one above."""

    name: str
    line: str


def text(plan: Plan) -> str:
    """The whole report, a line for each thing."""
    rows = [
        *_setting_rows(plan),
        *_memory_rows(plan),
        *_flops_rows(plan),
        *_collective_rows(plan),
        Row("compiled in", f"{plan.compile_seconds:.1f} s ({versions()})"),
        Row("fits", _fits(plan)),
    ]
    return "\n".join(f"{row.name:<14} {row.line}" for row in rows)


def _setting_rows(plan: Plan) -> list[Row]:
    config, topology = plan.config, plan.topology
    device, slices = plan.device_kind, "slices"
    if topology.is_simulated:
        device, slices = "a simulated device", "nodes"
    devices = f"{topology}: {topology.size} x {device}"
    if topology.slices > 1:
        devices += f", {topology.slices} {slices}"
    train = config.train
    batch = f"{train.grad_accumulation} x {plan.microbatch} sequences of {train.seq_len} per device"
    backends = f"attention {plan.attention}"
    if plan.dispatch:
        backends += f", experts {plan.dispatch}"
    if plan.kernels:
        backends += f" (Pallas kernels: {', '.join(plan.kernels)})"
    return [
        Row("topology", devices),
        Row("mesh", _mesh(plan)),
        Row("batch", f"{batch}; {config.tokens_per_step:,} tokens a step"),
        Row("parameters", f"{plan.parameters:,}, {plan.parameters_per_device:,} per device"),
        Row("computed by", backends),
    ]


def _mesh(plan: Plan) -> str:
    split = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return ", ".join(split) or "one device"


def _gib(number: float) -> str:
    return f"{number / GIB:.4g} GiB"


def _memory_rows(plan: Plan) -> list[Row]:
    rows = [Row("memory", f"per device: {_gib(plan.state_bytes)} of parameters and optimizer state by their shapes")]
    memory = plan.memory
    if memory is not None:
        rows += [
            Row("", f"arguments      {_gib(memory.arguments):>10}"),
            Row("", f"outputs        {_gib(memory.outputs):>10}, of which {_gib(memory.aliased)} replace arguments"),
            Row("", f"temporaries    {_gib(memory.temporaries):>10}"),
            Row("", f"generated code {_gib(memory.generated_code):>10}"),
            Row("", f"peak           {_gib(memory.peak):>10}, the sum of all these"),
        ]
    if plan.refusal is not None:
        rows.append(Row("", plan.refusal))
    return rows


def _fits(plan: Plan) -> str:
    topology = plan.topology
    if topology.is_simulated:
        usable = f"{_gib(topology.hbm)} ({topology.hbm / 1e9:g} GB)"
        if plan.fits is False:
            return f"no: the state alone needs {_gib(plan.state_bytes)} of {usable}"
        return f"unknown: the state needs {_gib(plan.state_bytes)} of {usable}. {SIMULATED_NOTE}"
    usable = f"{_gib(topology.hbm)} that a program may use of the chip's {CHIPS[topology.kind].sold_as}"
    if plan.memory is None:
        return f"no: the compiler found too little memory, see above; there are {usable}"
    margin = topology.hbm - plan.needed
    return f"{verdict(plan)}: {_gib(abs(margin))} {'left' if margin >= 0 else 'missing'} of {usable}"


def _flops_rows(plan: Plan) -> list[Row]:
    counted = "unknown" if plan.compiler_flops is None else f"{plan.compiler_flops:.4g}"
    return [
        Row("model FLOPs", f"{plan.model_flops:.4g} a step, {plan.model_flops_per_token:.4g} a token, all devices"),
        Row("", f"{plan.model_flops / plan.topology.size:.4g} a step and device"),
        Row("compiler FLOPs", f"{counted} a step and device; {FLOPS_NOTE}"),
    ]


def _collective_rows(plan: Plan) -> list[Row]:
    found = plan.collectives
    if found is None:
        return [Row("collectives", "unknown: the compiler wrote no text of the program")]
    rows = [Row("collectives", f"a step and device; {COLLECTIVES_NOTE}" if found.kinds else "none")]
    for kind, traffic in sorted(found.kinds.items()):
        rows.append(Row("", f"{kind:<25} {traffic.count:>8,} x {traffic.bytes / 1e6:>12,.3f} MB in all"))
    if found.unknown_loops:
        rows.append(Row("", f"{found.unknown_loops} loops do not say how often they run, and count once"))
    return rows


def as_json(plan: Plan) -> dict[str, Any]:
    """The report as JSON: bytes and FLOPs are plain numbers, None where they are not known."""
    memory = None
    if plan.memory is not None:
        memory = dataclasses.asdict(plan.memory) | {"peak": plan.memory.peak}
    collectives = None
    if plan.collectives is not None:
        collectives = {kind: dataclasses.asdict(traffic) for kind, traffic in sorted(plan.collectives.kinds.items())}
    return {
        "topology": str(plan.topology),
        "device_kind": plan.device_kind,
        "devices": plan.topology.size,
        "slices": plan.topology.slices,
        "simulated": plan.topology.is_simulated,
        "mesh": plan.mesh,
        "microbatch_per_device": plan.microbatch,
        "grad_accumulation": plan.config.train.grad_accumulation,
        "seq_len": plan.config.train.seq_len,
        "tokens_per_step": plan.config.tokens_per_step,
        "parameters": plan.parameters,
        "parameters_per_device": plan.parameters_per_device,
        "state_bytes_per_device": plan.state_bytes,
        "attention": plan.attention,
        "expert_dispatch": plan.dispatch,
        "pallas_kernels": plan.kernels,
        "memory_per_device": memory,
        "usable_memory_per_device": int(plan.topology.hbm),
        "refusal": plan.refusal,
        "model_flops_per_token": plan.model_flops_per_token,
        "model_flops_per_step": plan.model_flops,
        "compiler_flops_per_device_loops_once": plan.compiler_flops,
        "collectives_per_step_and_device": collectives,
        "loops_of_unknown_length": None if plan.collectives is None else plan.collectives.unknown_loops,
        "compile_seconds": plan.compile_seconds,
        "versions": versions(),
        "fits": plan.fits,
    }


def table_row(name: str, plan: Plan) -> dict[str, str]:
    """The cells of COLUMNS for the configuration of this name; memory in GiB per device."""
    memory = plan.memory
    accumulation = plan.config.train.grad_accumulation
    sent = "unknown"
    if plan.collectives is not None:
        sent = f"{sum(traffic.bytes for traffic in plan.collectives.kinds.values()) / 1e9:.3g}"
    return {
        "configuration": name,
        "topology": str(plan.topology),
        "mesh": _mesh(plan),
        "parameters": f"{plan.parameters:,}",
        "sequences": f"{accumulation} x {plan.microbatch}" if accumulation > 1 else str(plan.microbatch),
        "arguments": "-" if memory is None else f"{memory.arguments / GIB:.3g}",
        "temporaries": "-" if memory is None else f"{memory.temporaries / GIB:.3g}",
        "peak": "-" if memory is None else f"{memory.peak / GIB:.3g}",
        "usable": f"{plan.topology.hbm / GIB:.4g}",
        "fits": verdict(plan),
        "model PFLOP": f"{plan.model_flops / 1e15:.3g}",
        "sent": sent,
        "compiled": f"{plan.compile_seconds:.0f} s",
    }


class PlanTable(NamedTuple):
    """The table in a file.

    Attributes:
      made_with: versions() when it was written; empty before.
      rows: configuration -> column -> cell.
    """

    made_with: str
    rows: dict[str, dict[str, str]]


def read_table(file: Path) -> PlanTable:
    """The table in this file.

    Raises:
      UserError: there are no BEGIN and END marks.
    """
    inside = _between_marks(file)
    lines = [line for line in inside.splitlines() if line.startswith("|")]
    rows = {}
    for line in lines[2:]:  # below the headings and the rule
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        row = dict(zip(COLUMNS, cells, strict=True))
        rows[row["configuration"]] = row
    made_with = re.search(r"Made with (.*)\.$", inside, re.MULTILINE)
    return PlanTable(made_with=made_with[1] if made_with else "", rows=rows)


def write_table(file: Path, rows: dict[str, dict[str, str]]) -> None:
    """Put these rows, sorted by name, between the marks of this file.

    Raises:
      UserError: there are no BEGIN and END marks.
    """
    inside = _between_marks(file)
    lines = ["", f"Made with {versions()}.", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
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
