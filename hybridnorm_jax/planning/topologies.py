"""TPU slices that exist and nodes of GPUs, as devices to compile for; for a GPU of any size CPU devices stand."""

import dataclasses
import importlib.util
import logging
import math
import os
import re
from typing import Any

import jax

from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.planning.gpu_devices import GPUS, PLUGIN, gpu_devices

GIB = 2**30

# A simulated device costs memory and time of this machine.
MOST_SIMULATED = 4096
MOST_DIGITS = 6

NAMING = "such as v5p:4x4x4, 2xv6e:16x16 (two slices), h100:8, 2xh100:8 (two nodes) or gpu:8x80GB"
GPUS_OF_A_NODE = (1, 2, 4, 8)
# What JAX takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise
# (docs.jax.dev/en/latest/gpu_memory_allocation.html).
DEFAULT_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU, a chip of which is one JAX device.

    Attributes:
      hbm: bytes that libtpu 0.0.51 lets a program use. It says so when a program needs more.
      sold_as: the size that the vendor gives.
      shapes: of the slices that exist, smallest first.
    """

    hbm: float
    sold_as: str
    shapes: tuple[str, ...]


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Memory and shapes: cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Of v5p these pages list the most common shapes, up to
# 16x16x24, and say that most, but not all, other multiples of a 4x4x4 cube exist as well. Here are those listed, up to
# 2,048 chips. 2x2x4 is in their list of accelerator types (v5p-32).
CHIPS = {
    "v5e": Chip(hbm=15.75 * GIB, sold_as="16 GB", shapes=_SQUARES),
    "v6e": Chip(hbm=31.24 * GIB, sold_as="32 GB", shapes=_SQUARES),
    "v5p": Chip(
        hbm=95.73 * GIB,
        sold_as="95 GiB",
        shapes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    ),
}

# Without these libtpu asks a metadata server, warns that there is none, or logs. The accelerator type must be set, but
# the topology decides.
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
    """One or several slices of TPUs, or nodes of GPUs.

    Attributes:
      kind: v5e | v5p | v6e | a100 | h100 | h200 | b200, or gpu for one of any size.
      shape: chips along the axes of a slice; (devices,) of a GPU node.
      slices: how many slices or nodes of this shape.
      hbm: bytes of one device that a program may use; of a gpu all that it has.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int
    hbm: float

    @property
    def size(self) -> int:
        """How many devices all slices have."""
        return self.slices * math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes of a slice the links close a ring.

        A v5p slice of whole 4x4x4 cubes has rings along all axes, another one along none. On the other TPUs an axis is
        a ring if it is as long as the pod, 16 (jax-ml.github.io/scaling-book, "All About TPUs").
        """
        if self.kind == "v5p":
            has_whole_cubes = all(side % 4 == 0 for side in self.shape)
            return tuple(has_whole_cubes for _ in self.shape)
        return tuple(self.kind in CHIPS and side == 16 for side in self.shape)

    @property
    def is_simulated(self) -> bool:
        """Whether CPU devices stand for the devices."""
        return self.kind == "gpu"

    @property
    def is_gpu(self) -> bool:
        """Whether XLA's GPU compiler compiles for it."""
        return self.kind in GPUS

    @property
    def groups(self) -> str:
        """What several of its groups of devices are called."""
        return "slices" if self.kind in CHIPS else "nodes"

    def __str__(self) -> str:
        times = f"{self.slices}x" if self.slices > 1 else ""
        if self.is_simulated:
            return f"{times}gpu:{self.shape[0]}x{self.hbm / 1e9:g}GB"
        return f"{times}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology that `[SLICESx]KIND:SHAPE` names: v5p:4x4x4, 2xh100:8, gpu:8x80GB (GB = 10^9 bytes).

    Raises:
      UserError: no such slice or node exists; the message lists those that do.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([a-z]\w*):(\w[\w.]*)", text)
    kinds = (*CHIPS, *GPUS, "gpu")
    if not match or match[2] not in kinds:
        raise UserError(f"--topology {text}: must be [SLICESx]KIND:SHAPE, KIND one of {', '.join(kinds)}, {NAMING}")
    if max(map(len, re.findall(r"\d+", text))) > MOST_DIGITS:
        raise UserError(f"--topology {text:.60}: a number in it has more than {MOST_DIGITS} digits")
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    if kind in CHIPS:
        return _slices(text, slices, kind, shape)
    topology = _nodes(text, slices, kind, shape) if kind in GPUS else _simulated_nodes(text, slices, shape)
    if topology.size > MOST_SIMULATED:
        raise UserError(f"--topology {text}: {topology.size:,} devices; at most {MOST_SIMULATED:,} can be planned for")
    return topology


def _slices(text: str, slices: int, kind: str, shape: str) -> Topology:
    chip = CHIPS[kind]
    if shape not in chip.shapes:
        raise UserError(f"--topology {text}: no such slice; {kind} has {', '.join(chip.shapes)}")
    return Topology(kind=kind, shape=tuple(int(side) for side in shape.split("x")), slices=slices, hbm=chip.hbm)


def _nodes(text: str, nodes: int, kind: str, shape: str) -> Topology:
    if shape not in map(str, GPUS_OF_A_NODE):
        raise UserError(f"--topology {text}: a node has 1, 2, 4 or 8 GPUs; several nodes are 2x{kind}:8")
    return Topology(kind=kind, shape=(int(shape),), slices=nodes, hbm=GPUS[kind].memory * memory_fraction())


def _simulated_nodes(text: str, nodes: int, shape: str) -> Topology:
    node = re.fullmatch(r"([1-9]\d{0,3})x(\d{1,6}(?:\.\d+)?)GB", shape)
    if not node or float(node[2]) == 0:
        raise UserError(f"--topology {text}: must be [NODESx]gpu:DEVICESxMEMORYGB, such as gpu:8x80GB")
    return Topology(kind="gpu", shape=(int(node[1]),), slices=nodes, hbm=float(node[2]) * 1e9)


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes, by the environment of this process.

    Raises:
      UserError: XLA_PYTHON_CLIENT_MEM_FRACTION is no number above 0 and at most 1.
    """
    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", str(DEFAULT_MEMORY_FRACTION))
    if not re.fullmatch(r"[01]|[01]?\.\d+", text) or not 0 < float(text) <= 1:
        raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION={text}: must be a number above 0 and at most 1")
    return float(text)


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, to compile for. They cannot run anything, except CPU devices that stand for gpu.

    Call it before JAX starts, and for one kind of topology in a process.

    Raises:
      MissingExtraError: the compiler for these devices is not installed.
    """
    # A machine's accelerators are left to those who train on them.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger(PLUGIN).setLevel(logging.ERROR)  # where it is installed, it warns that no GPU can be used
    if topology.is_simulated:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\S*", "", flags)
        jax.config.update("jax_num_cpu_devices", topology.size)
        return jax.devices()
    if topology.is_gpu:
        return gpu_devices(topology.kind, topology.slices, topology.shape[0], asked=f"--topology {topology}")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError(f"--topology {topology}", extra="tpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["XLA_FLAGS"] = _without_other_platforms(os.environ.get("XLA_FLAGS", ""))
    from jax.experimental import topologies

    one_slice = dataclasses.replace(topology, slices=1)
    options: dict[str, Any] = {}
    if any(topology.wrap):
        missing_axes = 3 - len(topology.wrap)
        options["wrap"] = topology.wrap + (False,) * missing_axes
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    description = topologies.get_topology_desc(topology_name=str(one_slice), platform="tpu", **options)
    return list(description.devices)


def _without_other_platforms(flags: str) -> str:
    """XLA_FLAGS without those that are about CPUs or GPUs: libtpu ends the process at one that it does not know."""
    return " ".join(flag for flag in flags.split() if not flag.startswith(("--xla_cpu_", "--xla_gpu_")))
