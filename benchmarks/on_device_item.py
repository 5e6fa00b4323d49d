"""One part of on_device.py, in a process of its own: python benchmarks/on_device_item.py NAME [ARGUMENT ...]

The last line of standard output is its result, a JSON object.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import contestants
import device_checks
import jax
from command_line import machine

from hybridnorm_jax.commands.main import exit_status
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS, EXPERT_DISPATCHES, LOSS_KERNELS
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token

SMALL = "--small"
DTYPES = ("float32", "bfloat16")
CONVENTION = "causal attention by half, no rematerialization, over the bfloat16 peak of all devices"


def device(_: Sequence[str]) -> dict[str, Any]:
    """What is here, and which backends of attention, experts and loss it has, with the dtypes that each computes in."""
    found = machine() | {"platform": jax.default_backend()}
    found["memory"] = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    for key, names, obstacle in (
        ("attention", ATTENTION_BACKENDS, device_checks.attention_obstacle),
        ("experts", EXPERT_DISPATCHES, device_checks.dispatch_obstacle),
        ("loss", LOSS_KERNELS, device_checks.loss_obstacle),
    ):
        usable = {name: [dtype for dtype in DTYPES if obstacle(name, dtype) is None] for name in names}
        found[key] = {name: dtypes for name, dtypes in usable.items() if dtypes and name != "auto"}
    return found


def check(arguments: Sequence[str]) -> dict[str, Any]:
    """The checks of one backend: attention | experts | loss, its name, dtypes."""
    what, name, *dtypes = [each for each in arguments if each != SMALL]
    checks = {
        "attention": device_checks.attention_checks,
        "experts": device_checks.expert_checks,
        "loss": device_checks.loss_checks,
    }[what]
    found = [
        {"dtype": dtype, **each._asdict(), "passed": each.passed}
        for dtype in dtypes
        for each in checks(name, dtype, small=SMALL in arguments)
    ]
    return {"checks": found, "passed": all(each["passed"] for each in found)}


def speed(arguments: Sequence[str]) -> dict[str, Any]:
    """Our step of a configuration, on all devices: seconds of timing, then the configuration's arguments."""
    seconds, *settings = arguments
    config = _on_all_devices(settings)
    begin = time.perf_counter()
    ours = contestants.Ours(config)
    ours.steps(1)
    started = time.perf_counter() - begin
    mesh = ours.program.mesh
    times = _times(ours.steps, float(seconds))
    found = _rates(config, times, mesh.devices.flat[0].device_kind, mesh.size)
    stats = mesh.devices.flat[0].memory_stats() or {}
    return found | {
        "attention": ours.program.backend,
        "experts": ours.program.dispatch,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "seconds to the end of the first step": started,
        "device peak, bytes": stats.get("peak_bytes_in_use"),
        "facts": ours.facts,
    }


def torch(arguments: Sequence[str]) -> dict[str, Any]:
    """The same on one device by PyTorch: transformers' Olmo2, SDPA, torch.compile, fused AdamW."""
    seconds, *settings = arguments
    config = read_config(settings)
    peer = contestants.Peer(config)
    if peer.device == "cuda":
        peer.model = peer.torch.compile(peer.model)
    peer.steps(1)
    kind = peer.torch.cuda.get_device_name() if peer.device == "cuda" else "cpu"
    return _rates(config, _times(peer.steps, float(seconds)), kind, 1) | {
        "compiled": peer.device == "cuda",
        "facts": peer.facts,
    }


def _on_all_devices(settings: Sequence[str]) -> RunConfig:
    """The batch of each device as the settings give it, the parameters split over all devices."""
    config, count = read_config(settings), jax.device_count()
    if count == 1:
        return config
    sequences = config.train.batch_size * count
    return read_config([*settings, "mesh.data=1", f"mesh.fsdp={count}", f"train.batch_size={sequences}"])


def _times(steps: Callable[[int], None], seconds: float) -> list[float]:
    """Seconds of a step in five turns, after three steps that are not counted; all together about `seconds`."""
    steps(2)
    begin = time.perf_counter()
    steps(1)
    count = max(1, round(seconds / 5 / (time.perf_counter() - begin)))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        steps(count)
        times.append((time.perf_counter() - begin) / count)
    return times


def _rates(config: RunConfig, times: Sequence[float], kind: str, devices: int) -> dict[str, Any]:
    rate = config.tokens_per_step / statistics.median(times)
    flops = model_flops_per_token(config.model, config.train.seq_len)
    return {
        "tokens per step": config.tokens_per_step,
        "dtype": config.model.dtype,
        "step seconds, five turns": list(times),
        "tokens per second": rate,
        "tokens per second and device": rate / devices,
        "devices": devices,
        "device": kind,
        "MFU": mfu(rate, flops, kind, devices),
        "MFU counts": CONVENTION,
    }


ITEMS: Mapping[str, Callable[[Sequence[str]], dict[str, Any]]] = {
    "device": device,
    "check": check,
    "speed": speed,
    "torch": torch,
}


def main(arguments: Sequence[str]) -> None:
    """Compute one part and print it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    if not arguments or arguments[0] not in ITEMS:
        raise UserError(f"the first argument must be one of {', '.join(ITEMS)}")
    result = ITEMS[arguments[0]](arguments[1:])
    print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
