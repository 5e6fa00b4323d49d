"""GPUs that are not there, as devices to compile for with XLA's own GPU compiler. It needs no GPU, driver or CUDA."""

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import jax
import jaxlib

from hybridnorm_jax.errors import MissingExtraError, UserError


@dataclasses.dataclass(frozen=True)
class GpuKind:
    """What XLA's compiler asks about a GPU.

    Attributes:
      name: as the driver calls it, which is JAX's device_kind.
      memory: bytes of the device.
      bandwidth: bytes per second of its memory.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      shared, shared_for_block: bytes of shared memory of a multiprocessor, and the most that a block may ask for.
      cache: bytes of the second-level cache.
      clock: GHz.
      capability: compute capability, "major: 9".
    """

    name: str
    memory: int
    bandwidth: float
    cores: int
    lanes: int
    shared: int
    shared_for_block: int
    cache: int
    clock: float
    capability: str


PLUGIN = "jax_plugins.xla_cuda13"

# As in openxla/xla, xla/backends/gpu/target_config/specs: a100_sxm_80, h100_sxm, h200 and b200, which come from the
# drivers of these GPUs.
_H100 = GpuKind(
    name="NVIDIA H100 80GB HBM3",
    memory=84942979072,
    bandwidth=3352.32e9,
    cores=132,
    lanes=128,
    shared=233472,
    shared_for_block=232448,
    cache=52428800,
    clock=1.98,
    capability="major: 9",
)
GPUS = {
    "a100": GpuKind(
        name="NVIDIA A100-SXM4-80GB",
        memory=85100068864,
        bandwidth=2039.04e9,
        cores=108,
        lanes=64,
        shared=167936,
        shared_for_block=166912,
        cache=41943040,
        clock=1.41,
        capability="major: 8",
    ),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, name="NVIDIA H200", memory=151397597184, bandwidth=4800e9),
    "b200": GpuKind(
        name="NVIDIA B200",
        memory=191514411008,
        bandwidth=7672.32e9,
        cores=148,
        lanes=128,
        shared=233472,
        shared_for_block=232448,
        cache=132644864,
        clock=1.965,
        capability="major: 10",
    ),
}

# XLA's proto GpuTargetConfigProto, the part that it needs. With cub_version every sort fails (cudaErrorInvalidDevice).
# With a cuDNN of 9.22 or newer, xla_gpu_experimental_use_ragged_dot_fusion aborts the process.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_for_block}
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock} l2_cache_size: {cache}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory} cuda_compute_capability {{ {capability} }}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
# 9.10.0, as JAX writes a version of cuDNN.
_CUDNN = 91000


def gpu_devices(kind: str, nodes: int, devices: int, asked: str) -> list[jax.Device]:
    """The devices of `nodes` nodes with `devices` GPUs each, to compile for.

    Args:
      kind: a key of GPUS.
      asked: what the user asked for, for the message.

    Raises:
      MissingExtraError: the compiler is not installed.
      UserError: it does not belong to the JAX that is installed.
    """
    if not all(_is_there(module) for module in (PLUGIN, "nvidia.cu13")):
        raise MissingExtraError(asked, extra="plan-gpu")
    from jax.experimental import topologies

    _check_version(asked)
    _answer_for_cudnn(GPUS[kind])
    target = _TARGET.format(**dataclasses.asdict(GPUS[kind]))
    options: dict[str, Any] = {"target_config": target, "topology": f"1x{nodes}x{devices}"}
    return list(topologies.get_topology_desc(kind, platform="cuda", **options).devices)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_version(asked: str) -> None:
    """Raise UserError where compiler and JAX are of different versions: then it cannot read the kernels of Pallas."""
    found, wanted = importlib.metadata.version("jax-cuda13-pjrt"), jaxlib.__version__
    if found.split(".")[:3] != wanted.split(".")[:3]:
        raise UserError(
            f"{asked}: jax-cuda13-pjrt {found} does not belong to jaxlib {wanted}; "
            f"pip install 'jax-cuda13-pjrt=={wanted}.*'"
        )


def _answer_for_cudnn(gpu: GpuKind) -> None:
    """Answer what JAX asks of cuDNN and of the GPU before it lowers attention; here are none."""
    import jax._src.cudnn.fused_attention_stablehlo as attention

    if attention.cuda_versions is None:
        attention.check_cudnn_version = lambda: _CUDNN
    if not any(device.platform == "gpu" for device in jax.devices()):
        major = int(gpu.capability.removeprefix("major: "))
        attention.check_compute_capability = lambda least: major >= int(least.partition(".")[0])
