"""Slices that exist, as compile-only devices, and GPUs as simulated ones."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from hybridnorm_jax.errors import MissingExtraError, UserError

GIB = 2**30

NAMING = "such as v5p:4x4x4, 2xv6e:16x16 (two slices) or gpu:8x80GB"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU, a chip of which is one JAX device.

    Attributes:
      hbm: bytes that libtpu 0.0.51 lets a program use, as it says when there are too few.
      sold_as: the vendor's figure.
      shapes: of one slice, smallest first.
    """

    hbm: float
    sold_as: str
    shapes: tuple[str, ...]


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Memory and shapes: cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Of v5p these pages list the most common shapes, up to
# 16x16x24, and say that most, but not all, other multiples of a 4x4x4 cube exist as well; only the listed ones are
# taken here, and those up to 2,048 chips. 2x2x4 is in the list of accelerator types there (v5p-32).
CHIPS = {
    "v5e": Chip(15.75 * GIB, "16 GB", _SQUARES),
    "v6e": Chip(31.24 * GIB, "32 GB", _SQUARES),
    "v5p": Chip(
        95.73 * GIB,
        "95 GiB",
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    ),
}

# What libtpu otherwise asks a metadata server for, complains of not finding, or prints. The accelerator type is only
# asked for: the topology decides.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` times the devices named after the colon.

    Attributes:
      kind: v5e | v5p | v6e | gpu.
      shape: chips along the axes of a slice; (devices,) of a GPU node.
      hbm: bytes of one device that a program may use.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int
    hbm: float

    @property
    def size(self) -> int:
        """Devices of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes of a slice the links close a ring.

        On a v5p along all, where the slice is made of whole 4x4x4 cubes; on the others along an axis that is as long as
        the pod, 16 (jax-ml.github.io/scaling-book, "All About TPUs").
        """
        if self.kind == "v5p":
            return (all(side % 4 == 0 for side in self.shape),) * len(self.shape)
        return tuple(self.kind in CHIPS and side == 16 for side in self.shape)

    @property
    def is_simulated(self) -> bool:
        """Whether CPU devices stand for what there is no compiler for."""
        return self.kind == "gpu"

    def __str__(self) -> str:
        times = f"{self.slices}x" if self.slices > 1 else ""
        if self.is_simulated:
            return f"{times}gpu:{self.shape[0]}x{self.hbm / 1e9:g}GB"
        return f"{times}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology that `[SLICES x]KIND:SHAPE` names: v5p:4x4x4, 2xv6e:16x16, gpu:8x80GB (GB = 10^9 bytes).

    Raises:
      UserError: no such slice exists; the message lists those that do.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\w[\w.]*)", text)
    kinds = ", ".join((*CHIPS, "gpu"))
    if not match or match[2] not in (*CHIPS, "gpu"):
        raise UserError(f"--topology {text}: must be [SLICESx]KIND:SHAPE, KIND one of {kinds}, {NAMING}")
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    if kind == "gpu":
        node = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)GB", shape)
        if not node or float(node[2]) == 0:
            raise UserError(f"--topology {text}: must be [NODESx]gpu:DEVICESxMEMORYGB, such as gpu:8x80GB")
        return Topology(kind, (int(node[1]),), slices, float(node[2]) * 1e9)
    chip = CHIPS[kind]
    if shape not in chip.shapes:
        raise UserError(f"--topology {text}: no such slice; {kind} has {', '.join(chip.shapes)}")
    return Topology(kind, tuple(map(int, shape.split("x"))), slices, chip.hbm)


def devices_of(topology: Topology) -> list[jax.Device]:
    """Its devices, to compile for: a TPU's are not there to run on, a GPU's are CPU devices.

    To be called before JAX has started, and once in a process for a GPU topology.

    Raises:
      UserError: libtpu is not installed.
    """
    # On a machine that has accelerators: leave them to those who train.
    jax.config.update("jax_platforms", "cpu")
    if topology.is_simulated:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\S*", "", flags)
        jax.config.update("jax_num_cpu_devices", topology.size)
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError(f"--topology {topology}", extra="tpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {"topology_name": f"{topology.kind}:{'x'.join(map(str, topology.shape))}"}
    if any(topology.wrap):
        options["wrap"] = (*topology.wrap, *[False] * (3 - len(topology.wrap)))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    return list(topologies.get_topology_desc(platform="tpu", **options).devices)
