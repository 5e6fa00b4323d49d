"""How much memory a device has."""

import os
from pathlib import Path

import jax

# What the memory of this process's container is limited to, on Linux.
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def room_of(device: jax.Device) -> int | None:
    """Bytes that this device has; of a CPU its share of the machine's or the container's memory. None: unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if CONTAINER_LIMIT.is_file() and (text := CONTAINER_LIMIT.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits) // jax.local_device_count()
