"""What computes a run: versions of packages, devices, machine and process."""

import os
import platform
import socket
from importlib import metadata
from typing import Any

import jax

PACKAGES = ("hybridnorm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """What computes here, as log.txt says it (text_log.py)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # imported from a folder
            continue
    devices = jax.devices()
    return {
        "versions": versions | {"python": platform.python_version()},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
