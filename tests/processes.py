"""Starts several processes of train.py or eval.py on this machine; for test_distributed.py."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = ("OMPI_", "SLURM_", "PMI", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """This process's, with so many simulated devices and no trace of a launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", kept.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    return kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def together(port: int, count: int, number: int) -> list[str]:
    """The words that make one of `count` processes number `number`."""
    return [
        f"distributed.coordinator=127.0.0.1:{port}",
        f"distributed.num_processes={count}",
        f"distributed.process_id={number}",
    ]


def run(
    words: list[list[str]],
    *,
    devices: int,
    seconds: float,
    script: str = "train.py",
    environs: list[dict[str, str]] | None = None,
):
    """One process for each list of words, side by side: [(status, standard output, standard error)].

    Those that have not ended after `seconds` are killed, and their status is -9. `environs`: each one's own variables.
    """
    command = [sys.executable, str(REPOSITORY / script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, *each], env=environment(devices) | own, **pipes)
        for each, own in zip(words, environs or [{}] * len(words), strict=True)
    ]
    end = time.monotonic() + seconds
    results = []
    try:
        for process in started:
            try:
                out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            results.append((process.returncode, out, err))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def run_together(count: int, words: list[str], *, devices: int, seconds: float, script: str = "train.py"):
    """`count` processes with the same words, as `run`."""
    port = free_port()
    return run(
        [[*words, *together(port, count, number)] for number in range(count)],
        devices=devices,
        seconds=seconds,
        script=script,
    )
