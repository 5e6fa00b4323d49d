"""Run once by whoever has a GPU or a TPU: is what it computes right, and how fast: python benchmarks/on_device.py

First every backend of attention, experts and loss that the device has is checked in float32 and bfloat16: models
against their authors' tensors, kernels against float64 (device_checks.py). Then a training step of real sizes is timed,
beside PyTorch (transformers' Olmo2, SDPA, torch.compile) where torch finds a GPU. Each part runs in a process of its
own with a time limit, all of them within --minutes. After each part the file --out has what is known by then, and
beside it a Markdown file with the same in a row. Data and a network are not needed. The status is 1 where a check
failed.

--small computes on small shapes alone, on any machine, to see whether the script works; its times mean nothing.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command_line import make_parser, number_text, positive, run_main

ITEM = Path(__file__).with_name("on_device_item.py")
# Seconds that a part may take: the compilers of GPUs try many products out.
LIMITS = {"device": 60, "check": 75, "speed": 120, "torch": 120}
# Seconds of timing in a part, after compilation.
TIMING = 12.0

ONE_MODEL = ("151m", "train.batch_size=16", "train.grad_accumulation=1")
LARGER = ("1b2", "train.batch_size=8")
EXPERTS = ("moe_1b_7b", "model.num_layers=2", "train.batch_size=4", "mesh.expert=1")
TINY = (
    "quickstart",
    "model.num_layers=2",
    "model.d_model=32",
    "model.num_heads=4",
    "model.mlp_dim=64",
    "model.scan_unroll=1",
    "train.batch_size=8",
    "train.seq_len=32",
)
# Not what a run takes by itself anywhere: the reference of the checks, and what XLA expands.
UNCHECKED = ("dense", "ragged")


class Part(NamedTuple):
    """What one process computes: the first argument of on_device_item.py, and the others."""

    item: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.item, *self.arguments])


def first_parts(device: Mapping[str, Any], *, small: bool, torch: bool) -> Iterator[Part]:
    """All parts but the one that says what the device is, the most important ones first."""
    flag = ("--small",) if small else ()
    for what in ("attention", "experts", "loss"):
        for name, dtypes in device[what].items():
            if name not in UNCHECKED:
                yield Part("check", (what, name, *dtypes, *flag))
    if small:
        yield Part("speed", ("0.1", *TINY))
        if torch:
            yield Part("torch", ("0.1", *TINY))
        return
    timing = str(TIMING)
    yield Part("speed", (timing, *ONE_MODEL))
    if torch:
        yield Part("torch", (timing, *ONE_MODEL))
    if device["platform"] == "gpu":
        yield Part("speed", (timing, *ONE_MODEL, "model.attention=flash"))
    yield Part("speed", (timing, *LARGER))
    if device["platform"] == "tpu":
        yield Part("speed", (timing, *LARGER, "train.loss_kernel=pallas"))
    if torch:
        yield Part("torch", (timing, *LARGER))
    yield Part("speed", (timing, *EXPERTS))


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Compute a part in its own process, for so many seconds at most; "status" is done, failed or out of time."""
    begin = time.monotonic()
    command = [sys.executable, str(ITEM), part.item, *part.arguments]
    # A session of its own, so that what it starts ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"part": part.name, "status": "out of time", "seconds": time.monotonic() - begin}
    found: dict[str, Any] = {"part": part.name, "seconds": time.monotonic() - begin}
    if process.returncode:
        lines = errors.strip().splitlines() or [f"status {process.returncode}"]
        return found | {"status": "failed", "error": lines[-1].removeprefix("error: ")[:500]}
    return found | {"status": "done", "result": json.loads(output.splitlines()[-1])}


def measure(out: Path, *, minutes: float, small: bool, torch: bool) -> dict[str, Any]:
    """Compute all parts, and write what is known after each."""
    deadline = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "parts": []}

    def add(part: Part) -> dict[str, Any]:
        left = deadline - time.monotonic()
        found = {"part": part.name, "status": "not begun, out of time"}
        if left > 1:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            found = run_part(part, min(left, LIMITS[part.item]))
        result["parts"].append(found)
        write(out, result)
        print(f"{part.name}: {outcome(found)}", file=sys.stderr, flush=True)
        return found

    device = add(Part("device"))
    if device["status"] == "done":
        result["device"] = device["result"]
        for part in first_parts(device["result"], small=small, torch=torch):
            add(part)
    return result


def write(out: Path, result: Mapping[str, Any]) -> None:
    """The JSON file and the Markdown beside it, each whole or not at all."""
    for path, text in ((out, json.dumps(result, indent=2)), (out.with_suffix(".md"), markdown(result))):
        unfinished = path.with_suffix(path.suffix + ".part")
        unfinished.write_text(text + "\n")
        unfinished.replace(path)


def failures(result: Mapping[str, Any]) -> list[str]:
    """The checks that did not pass, and the parts with checks that did not end."""
    failed = []
    for part in result["parts"]:
        if part["part"].startswith(("check", "device")) and part["status"] != "done":
            failed.append(f"{part['part']}: {outcome(part)}")
        for check in part.get("result", {}).get("checks", []):
            if not check["passed"]:
                failed.append(f"{part['part']}, {check['dtype']}, {check['name']}: {check['error']:.2g}")
    return failed


def outcome(part: Mapping[str, Any]) -> str:
    """How a part ended, in a few words."""
    if part["status"] != "done":
        return ": ".join([part["status"], *([part["error"]] if "error" in part else [])])
    found = part["result"]
    if "checks" in found:
        passed = sum(check["passed"] for check in found["checks"])
        return f"{passed} of {len(found['checks'])} checks passed"
    if "tokens per second" in found:
        share = "" if found["MFU"] is None else f", MFU {found['MFU']:.1%}"
        return f"{found['tokens per second']:,.0f} tokens/s{share}"
    return f"{found['devices']} x {found['device']}"


def markdown(result: Mapping[str, Any]) -> str:
    """One row of a table for all of it, and how each part ended."""
    device = result.get("device", {})
    checks = [check for part in result["parts"] for check in part.get("result", {}).get("checks", [])]
    rates: dict[str, str] = {}
    for part in result["parts"]:
        item, _, arguments = part["part"].partition(" ")
        if item in ("speed", "torch") and part["status"] == "done":
            rates[f"{item} {arguments.partition(' ')[2]}"] = outcome(part)
    row = {
        "date": result["started"][:10],
        "devices": f"{device.get('devices', '?')} x {device.get('device', '?')}",
        "JAX": device.get("jax", "?"),
        "checks passed": f"{sum(check['passed'] for check in checks)} of {len(checks)}",
        **rates,
    }
    lines = [f"| {' | '.join(row)} |", f"|{'---|' * len(row)}", f"| {' | '.join(row.values())} |", ""]
    lines.append("MFU counts causal attention by half and no rematerialization, over the bfloat16 peak of all devices.")
    lines.append("")
    lines += [f"- {part['part']}: {outcome(part)}, {number_text(part.get('seconds'))} s" for part in result["parts"]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Measure, write, and print the Markdown."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("on_device.json"), help="the file to write (on_device.json)")
    parser.add_argument("--minutes", type=positive, default=8, help="at most, for all parts together (default 8)")
    parser.add_argument("--small", action="store_true", help="small shapes, to see whether the script works")
    parser.add_argument("--torch", action="store_true", help="PyTorch's step too, even without a GPU of NVIDIA's")
    options = parser.parse_args(arguments)
    torch = options.torch or (not options.small and _has_cuda())
    result = measure(options.out, minutes=options.minutes, small=options.small, torch=torch)
    print(json.dumps(result, indent=2) if options.json else markdown(result))
    failed = failures(result)
    for line in failed:
        print(line, file=sys.stderr)
    if failed:
        sys.exit(1)


def _has_cuda() -> bool:
    """Whether torch is there and finds a GPU; asked in another process, as it would keep memory of the GPU."""
    question = "import torch, transformers, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    run_main(main)
