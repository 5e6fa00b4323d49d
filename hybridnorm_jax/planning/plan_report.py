"""A Plan as text, as JSON, and as a row of the table in docs/planning.md."""

import dataclasses
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.compilation import Plan
from hybridnorm_jax.planning.topologies import CHIPS, GIB

FLOPS_NOTE = "the compiler's own count takes a loop once, however often it runs, and kernels as nothing"
COLLECTIVES_NOTE = "each counts as often as its loop runs; its bytes are the larger of what goes in and what comes out"
SIMULATED_NOTE = (
    "CPU devices stand for the GPUs: what lies where is exact; temporaries, code and the choice of collectives are the "
    "CPU compiler's, with the attention and experts named above and bfloat16 widened to float32 in places"
)

COLUMNS = (
    *("configuration", "topology", "mesh", "parameters", "sequences", "arguments", "temporaries", "peak", "usable"),
    *("fits", "model PFLOP", "sent", "compiled"),
)
BEGIN, END = "<!-- planning table: begin -->", "<!-- planning table: end -->"


def versions() -> str:
    """JAX and the TPU compiler, as installed."""
    libtpu = importlib.metadata.version("libtpu") if importlib.util.find_spec("libtpu") else "none"
    return f"JAX {importlib.metadata.version('jax')}, libtpu {libtpu}"


def verdict(plan: Plan) -> str:
    """One word: yes, no or unknown."""
    return {True: "yes", False: "no", None: "unknown"}[plan.fits]


def text(plan: Plan) -> str:
    """The whole report, a line for each thing."""
    config, topology = plan.config, plan.topology
    devices = f"{topology.size} x {'a simulated device' if topology.is_simulated else plan.device_kind}"
    slices = f", {topology.slices} {'nodes' if topology.is_simulated else 'slices'}" if topology.slices > 1 else ""
    micro = f"{config.train.grad_accumulation} x {plan.microbatch} sequences of {config.train.seq_len} per device"
    experts = f", experts {plan.dispatch}" if plan.dispatch else ""
    pallas = f" (Pallas kernels: {', '.join(plan.kernels)})" if plan.kernels else ""
    rows = [
        ("topology", f"{topology}: {devices}{slices}"),
        ("mesh", _mesh(plan, " ")),
        ("batch", f"{micro}; {config.tokens_per_step:,} tokens a step"),
        ("parameters", f"{plan.parameters:,}, {plan.parameters_per_device:,} per device"),
        ("computed by", f"attention {plan.attention}{experts}{pallas}"),
        *_memory_rows(plan),
        *_flops_rows(plan),
        *_collective_rows(plan),
        ("compiled in", f"{plan.compile_seconds:.1f} s ({versions()})"),
        ("fits", _fits(plan)),
    ]
    return "\n".join(f"{name:<14} {line}" for name, line in rows)


def _mesh(plan: Plan, between: str) -> str:
    split = [f"{axis}{between}{size}" for axis, size in plan.mesh.items() if size > 1]
    return ", ".join(split) or "one device"


def _gib(number: float) -> str:
    return f"{number / GIB:.4g} GiB"


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    rows = [("memory", f"per device: {_gib(plan.state_bytes)} of parameters and optimizer state by their shapes")]
    memory = plan.memory
    if memory is not None:
        rows += [
            ("", f"arguments      {_gib(memory.arguments):>10}"),
            ("", f"outputs        {_gib(memory.outputs):>10}, of which {_gib(memory.aliased)} replace arguments"),
            ("", f"temporaries    {_gib(memory.temporaries):>10}"),
            ("", f"generated code {_gib(memory.generated_code):>10}"),
            ("", f"peak           {_gib(memory.peak):>10}, the sum of all these"),
        ]
    if plan.refusal is not None:
        rows.append(("", plan.refusal))
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
        return f"no: the compiler gave up, see memory; there are {usable}"
    margin = topology.hbm - plan.needed
    return f"{verdict(plan)}: {_gib(abs(margin))} {'left' if margin >= 0 else 'missing'} of {usable}"


def _flops_rows(plan: Plan) -> list[tuple[str, str]]:
    counted = "unknown" if plan.compiler_flops is None else f"{plan.compiler_flops:.4g}"
    return [
        ("model FLOPs", f"{plan.model_flops:.4g} a step, {plan.model_flops_per_token:.4g} a token, all devices"),
        ("", f"{plan.model_flops / plan.topology.size:.4g} a step and device"),
        ("compiler FLOPs", f"{counted} a step and device; {FLOPS_NOTE}"),
    ]


def _collective_rows(plan: Plan) -> list[tuple[str, str]]:
    found = plan.collectives
    if found is None:
        return [("collectives", "unknown: the compiler wrote no program down")]
    rows = [("collectives", f"a step and device; {COLLECTIVES_NOTE}" if found.kinds else "none")]
    for kind, traffic in sorted(found.kinds.items()):
        rows.append(("", f"{kind:<25} {traffic.count:>8,} x {traffic.bytes / 1e6:>12,.3f} MB in all"))
    if found.unknown_loops:
        rows.append(("", f"{found.unknown_loops} loops do not say how often they run, and count once"))
    return rows


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs; bytes and FLOPs are plain numbers, null where they are not known."""
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
    memory, found = plan.memory, plan.collectives
    accumulation = plan.config.train.grad_accumulation
    sent = None if found is None else sum(traffic.bytes for traffic in found.kinds.values())
    cells = (
        *(name, str(plan.topology), _mesh(plan, " "), f"{plan.parameters:,}"),
        f"{accumulation} x {plan.microbatch}" if accumulation > 1 else str(plan.microbatch),
        *(f"{number / GIB:.3g}" if memory else "-" for number in _table_memory(plan)),
        *(f"{plan.topology.hbm / GIB:.4g}", verdict(plan), f"{plan.model_flops / 1e15:.3g}"),
        *("unknown" if sent is None else f"{sent / 1e9:.3g}", f"{plan.compile_seconds:.0f} s"),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _table_memory(plan: Plan) -> tuple[int, int, int]:
    memory = plan.memory
    return (memory.arguments, memory.temporaries, memory.peak) if memory else (0, 0, 0)


def read_table(file: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """(the versions it was made with, configuration -> cells) of the table in this file.

    Raises:
      UserError: there are no BEGIN and END marks.
    """
    inside = _inside(file)
    lines = [line.strip().strip("|").split("|") for line in inside.splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line] for line in lines[2:]]
    made = re.search(r"Made with (.*)\.$", inside, re.MULTILINE)
    return made[1] if made else "", {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows}


def write_table(file: Path, rows: dict[str, dict[str, str]]) -> None:
    """Put these rows, sorted by name, between the marks of this file."""
    inside = _inside(file)
    lines = ["", f"Made with {versions()}.", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in sorted(rows):
        cells = [f"`{rows[name][column]}`" if column == "topology" else rows[name][column] for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace(BEGIN + inside + END, BEGIN + "\n".join(lines) + "\n" + END), encoding="utf-8")


def _inside(file: Path) -> str:
    _, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file}: needs the lines {BEGIN} and {END}, between which the table is written")
    return inside
