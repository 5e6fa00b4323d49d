"""What a step takes at least on a device by its data sheet: arithmetic, memory and networks each at their peak."""

import dataclasses
from typing import NamedTuple

from hybridnorm_jax.training.throughput import PEAK_FLOPS

GIGABIT = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class DataSheet:
    """What the vendor promises of one device.

    Attributes:
      flops: bfloat16 FLOP/s of dense matrix products.
      memory: bytes/s of its memory.
      inside: bytes/s that it sends over all links within a slice or node, one direction.
      between: bytes/s that it sends to other slices or nodes, one direction.
      inside_name, between_name: what these networks are called.
    """

    flops: float
    memory: float
    inside: float
    between: float
    inside_name: str
    between_name: str


def _tpu(device_kind: str, *, memory: float, inside: float, between: float) -> DataSheet:
    return DataSheet(PEAK_FLOPS[device_kind], memory, inside, between, "ICI", "DCN")


def _gpu(device_kind: str, *, memory: float, inside: float, between: float) -> DataSheet:
    return DataSheet(PEAK_FLOPS[device_kind], memory, inside, between, "NVLink", "network")


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. ICI is half of the "bidirectional" numbers there (400, 1200
# and 800 GB/s a chip). DCN: v5e 6.4 Tbit/s and v6e 25.6 Tbit/s a pod of 256 chips, v5p 50 Gbit/s a chip.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and of HGX B200; NVLink is half of what they give for
# both directions (600, 900, 900, 1800 GB/s). Network: one adapter for each GPU, as in DGX A100 (200 Gbit/s), DGX H100,
# DGX H200 and DGX B200 (400 Gbit/s).
DATA_SHEETS = {
    "v5e": _tpu("TPU v5e", memory=819e9, inside=200e9, between=25 * GIGABIT),
    "v5p": _tpu("TPU v5p", memory=2765e9, inside=600e9, between=50 * GIGABIT),
    "v6e": _tpu("TPU v6e", memory=1638e9, inside=400e9, between=100 * GIGABIT),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", memory=2039e9, inside=300e9, between=200 * GIGABIT),
    "h100": _gpu("NVIDIA H100 80GB HBM3", memory=3350e9, inside=450e9, between=400 * GIGABIT),
    "h200": _gpu("NVIDIA H200", memory=4800e9, inside=450e9, between=400 * GIGABIT),
    "b200": _gpu("NVIDIA B200", memory=8000e9, inside=900e9, between=400 * GIGABIT),
}


class Work(NamedTuple):
    """What one device does in a step: FLOPs, bytes of memory moved, bytes sent inside and between slices or nodes."""

    flops: float
    memory: float
    inside: float
    between: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step at the peak of each, if nothing else took time.

    A step takes at least the longest of them, `least_seconds`, also if all overlap perfectly. So what follows from it
    is an upper bound, which no run reaches.
    """

    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least_seconds(self) -> float:
        """What a step takes at the least."""
        return self.seconds[self.bound]


def roofline(work: Work, sheet: DataSheet) -> Roofline:
    """The roofline of a step that does this work on each device."""
    return Roofline(
        {
            "arithmetic": work.flops / sheet.flops,
            "HBM": work.memory / sheet.memory,
            sheet.inside_name: work.inside / sheet.inside,
            sheet.between_name: work.between / sheet.between,
        }
    )
