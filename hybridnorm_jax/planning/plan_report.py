"""A Plan as text and as JSON."""

import dataclasses
import importlib.metadata
from typing import Any, NamedTuple

from hybridnorm_jax.planning.compilation import Plan
from hybridnorm_jax.planning.counts import Counts
from hybridnorm_jax.planning.model_parts import PARTS
from hybridnorm_jax.planning.roofline import DATA_SHEETS
from hybridnorm_jax.planning.topologies import CHIPS, GIB, memory_fraction

COUNTS_NOTE = "a step and device, counted in the compiled program; loops as often as they turn"
COLLECTIVES_NOTE = "each counts as often as its loop runs; its bytes are the larger of what goes in and what comes out"
ROOFLINE_NOTE = "at the peak of the data sheet, each alone"
BOUND_NOTE = "an UPPER BOUND, which no run reaches: all overlaps, and nothing waits"
SIMULATED_NOTE = (
    "CPU devices stand for the GPUs. Which device holds what is exact. Temporaries, code, counts and the choice of "
    "collectives are the CPU compiler's, with the attention and experts named above; some bfloat16 it makes float32"
)
COMPILERS = ("libtpu", "jax-cuda13-pjrt")


def versions() -> str:
    """The versions of JAX and of the compilers for TPUs and GPUs that are installed."""
    found = [f"JAX {importlib.metadata.version('jax')}"]
    for name in COMPILERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


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
        Row("model FLOPs", f"{plan.model_flops:.4g} a step, {plan.model_flops_per_token:.4g} a token, all devices"),
        Row("", f"{plan.model_flops / plan.topology.size:.4g} a step and device"),
        *_count_rows(plan.counts),
        *_collective_rows(plan),
        *_roofline_rows(plan),
        Row("compiled in", f"{plan.compile_seconds:.1f} s ({versions()})"),
        Row("fits", _fits(plan)),
    ]
    return "\n".join(f"{row.name:<14} {row.line}".rstrip() for row in rows)


def _setting_rows(plan: Plan) -> list[Row]:
    config, topology = plan.config, plan.topology
    device = "a simulated device" if topology.is_simulated else plan.device_kind
    devices = f"{topology}: {topology.size} x {device}"
    if topology.slices > 1:
        devices += f", {topology.slices} {topology.groups}"
    batch = f"{plan.accumulation} x {plan.microbatch} sequences of {config.train.seq_len} per device"
    padding = "" if config.data.packing == "windows" else ", padding included"
    backends = f"attention {plan.attention}"
    if plan.dispatch:
        backends += f", experts {plan.dispatch}"
    if plan.kernels:
        backends += f" (Pallas kernels: {', '.join(plan.kernels)})"
    return [
        Row("topology", devices),
        Row("mesh", mesh_text(plan)),
        Row("batch", f"{batch}; {config.tokens_per_step:,} tokens a step{padding}"),
        Row("parameters", f"{plan.parameters:,}, {plan.parameters_per_device:,} per device"),
        Row("computed by", backends),
        Row("remat", f"{plan.remat}{'' if plan.remat == config.model.remat else ', chosen by model.remat=auto'}"),
    ]


def mesh_text(plan: Plan) -> str:
    """The axes of the mesh that split something, with their sizes."""
    split = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return ", ".join(split) or "one device"


def _gib(number: float) -> str:
    return f"{number / GIB:.4g} GiB"


def _memory_rows(plan: Plan) -> list[Row]:
    averaged = ", their average" if plan.config.optimizer.averages else ""
    state = f"{_gib(plan.state_bytes)} of parameters{averaged} and optimizer state by their shapes"
    rows = [Row("memory", f"per device: {state}")]
    memory = plan.memory
    if memory is not None:
        stated = "the sum of all these, as the compiler states no other"
        if memory.stated_peak is not None:
            stated = f"as the compiler states it; all of these together are {_gib(memory.sum)}"
        rows += [
            Row("", f"arguments      {_gib(memory.arguments):>10}"),
            Row("", f"outputs        {_gib(memory.outputs):>10}, of which {_gib(memory.aliased)} replace arguments"),
            Row("", f"temporaries    {_gib(memory.temporaries):>10}"),
            Row("", f"generated code {_gib(memory.generated_code):>10}"),
            Row("", f"peak           {_gib(memory.peak):>10}, {stated}"),
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
    if topology.is_gpu:
        usable = f"{_gib(topology.hbm)}, {memory_fraction():.0%} of the GPU's (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    else:
        usable = f"{_gib(topology.hbm)} that a program may use of the chip's {CHIPS[topology.kind].sold_as}"
    if plan.memory is None:
        return f"no: the compiler found too little memory, see above; there are {usable}"
    margin = topology.hbm - plan.needed
    return f"{verdict(plan)}: {_gib(abs(margin))} {'left' if margin >= 0 else 'missing'} of {usable}"


def _count_rows(counts: Counts | None) -> list[Row]:
    """FLOPs, bytes of memory and bytes sent of each part of the model."""
    if counts is None:
        return [Row("counts", "unknown: the compiler wrote no text of the program")]
    rows = [
        Row("counts", COUNTS_NOTE),
        Row("", f"{'':<16} {'products':>12} {'kernels':>12} {'memory':>12} {'sent':>12}"),
    ]
    columns = (counts.product_flops, counts.kernel_flops, counts.memory_bytes, counts.sent_bytes)
    for part in PARTS:
        rows.append(_count_row(part, *(column[part] for column in columns)))
    rows.append(_count_row("all", *(sum(column.values()) for column in columns)))
    if counts.unknown_kernels:
        rows.append(Row("", f"not counted, as their formula is not known: {', '.join(counts.unknown_kernels)}"))
    if counts.balanced_loops:
        rows.append(
            Row("", "experts count as where each gets as many tokens; their loops turn as often as a step needs")
        )
    if counts.unknown_loops:
        loops = ", ".join(counts.unknown_loops)
        rows.append(
            Row("", f"{len(counts.unknown_loops)} loops do not say how often they run, and count once: {loops}")
        )
    return rows


def _count_row(part: str, products: int, kernels: int, memory: int, sent: int) -> Row:
    flops = f"{products / 1e12:>6.4g} TFLOP {kernels / 1e12:>6.4g} TFLOP"
    return Row("", f"{part:<16} {flops} {memory / GIB:>8.4g} GiB {sent / GIB:>8.4g} GiB")


def _collective_rows(plan: Plan) -> list[Row]:
    found = plan.collectives
    if found is None:
        return []
    rows = [Row("collectives", f"a step and device; {COLLECTIVES_NOTE}" if found.kinds else "none")]
    for kind, traffic in sorted(found.kinds.items()):
        rows.append(Row("", f"{kind:<25} {traffic.count:>8,} x {traffic.bytes / 1e6:>12,.3f} MB in all"))
    if found.kinds:
        inside, between = found.links
        inside_name, between_name = _networks(plan)
        sent = f"{inside / 1e6:,.3f} MB over {inside_name}, {between / 1e6:,.3f} MB over {between_name}"
        rows.append(Row("", f"at the least each device sends {sent}"))
    if found.kinds and plan.overlap is not None:
        alone = len(plan.overlap.alone)
        names = f"; nothing runs beside {', '.join(plan.overlap.alone)}" if alone else ""
        rows.append(Row("", f"other work runs beside {plan.overlap.collectives - alone} of them in the text{names}"))
    return rows


def _networks(plan: Plan) -> tuple[str, str]:
    sheet = DATA_SHEETS.get(plan.topology.kind)
    return ("links of a node", "the network") if sheet is None else (sheet.inside_name, sheet.between_name)


def _roofline_rows(plan: Plan) -> list[Row]:
    found = plan.roofline
    if found is None or plan.most_tokens_per_second is None or plan.most_mfu is None:
        return []
    seconds = ", ".join(f"{name} {1000 * each:.4g} ms" for name, each in found.seconds.items())
    most = f"{plan.most_tokens_per_second:,.0f} tokens/s on all devices, MFU {plan.most_mfu:.1%}"
    return [
        Row("roofline", f"{seconds}; {ROOFLINE_NOTE}"),
        Row("at most", f"{most}, bound by {found.bound}; {BOUND_NOTE}"),
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The report as JSON: bytes, FLOPs and seconds are plain numbers, None where they are not known."""
    memory = None
    if plan.memory is not None:
        memory = dataclasses.asdict(plan.memory) | {"peak": plan.memory.peak, "sum": plan.memory.sum}
    found = plan.roofline
    return {
        "topology": str(plan.topology),
        "device_kind": plan.device_kind,
        "devices": plan.topology.size,
        "slices": plan.topology.slices,
        "simulated": plan.topology.is_simulated,
        "mesh": plan.mesh,
        "microbatch_per_device": plan.microbatch,
        "grad_accumulation": plan.accumulation,
        "seq_len": plan.config.train.seq_len,
        "tokens_per_step": plan.config.tokens_per_step,
        "parameters": plan.parameters,
        "parameters_per_device": plan.parameters_per_device,
        "state_bytes_per_device": plan.state_bytes,
        "attention": plan.attention,
        "expert_dispatch": plan.dispatch,
        "pallas_kernels": plan.kernels,
        "collectives_without_overlap": None if plan.overlap is None else plan.overlap.alone,
        "remat": plan.remat,
        "memory_per_device": memory,
        "usable_memory_per_device": int(plan.topology.hbm),
        "refusal": plan.refusal,
        "model_flops_per_token": plan.model_flops_per_token,
        "model_flops_per_step": plan.model_flops,
        **_counts_as_json(plan),
        "roofline_seconds": None if found is None else found.seconds,
        "bound_by": None if found is None else found.bound,
        "upper_bound_tokens_per_second": plan.most_tokens_per_second,
        "upper_bound_mfu": plan.most_mfu,
        "compile_seconds": plan.compile_seconds,
        "versions": versions(),
        "fits": plan.fits,
    }


def _counts_as_json(plan: Plan) -> dict[str, Any]:
    counts = plan.counts
    if counts is None:
        names = ("counts_per_step_and_device", "collectives_per_step_and_device", "loops_of_unknown_length")
        return dict.fromkeys(names)
    inside, between = counts.collectives.links
    kinds = counts.collectives.kinds
    return {
        "counts_per_step_and_device": {
            "product_flops": counts.product_flops,
            "kernel_flops": counts.kernel_flops,
            "memory_bytes": counts.memory_bytes,
            "sent_bytes": counts.sent_bytes,
            "sent_inside": round(inside),
            "sent_between": round(between),
            "unknown_kernels": counts.unknown_kernels,
            "unknown_loops": counts.unknown_loops,
            "balanced_loops": counts.balanced_loops,
        },
        "collectives_per_step_and_device": {kind: dataclasses.asdict(kinds[kind]) for kind in sorted(kinds)},
        "loops_of_unknown_length": len(counts.unknown_loops),
    }
