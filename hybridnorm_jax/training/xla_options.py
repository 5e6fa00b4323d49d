"""What XLA's compiler is told about the training step, by platform: the one place for its options.

They are options of that one program and not XLA_FLAGS. So they hold however training is started, reach no other
program, and `hybridnorm plan` compiles with them. What the user's own XLA_FLAGS say wins.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping

import jax
import jaxlib

from hybridnorm_jax.errors import UserError

Options = Mapping[str, bool | int | str]

# On GPUs. Tried with 1b2 on 8 and 2 x 8 H100s with XLA of JAX 0.10.2, by the time of the work that stands between the
# start and the end of each collective in the compiled schedule, see docs/gpus.md. Left alone, as they hide less or take
# memory for nothing: xla_gpu_enable_pipelined_all_gather, _reduce_scatter and _all_reduce (1 GiB more),
# xla_gpu_enable_while_loop_double_buffering (3.5 GiB more), and combining collectives up to 128 MiB with
# xla_gpu_all_gather_combine_threshold_bytes and its like (a layer then waits for all its parameters at once).
_GPU: Options = {
    # Collectives start as early and end as late as they can. XLA does so by default by now; a step that is split by
    # fsdp relies on it.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
# On CPUs, with the XLA that they were tried with; the next one may have other names, or no need of them. Thread-seconds
# of a step of quickstart on two cores of a Xeon with AVX-512: 0.39 without, 0.36 with the first, 0.335 with both.
# Beside PyTorch (2026-11-27, see README) quickstart gains 0.81 -> 0.97, and 8 layers of width 512 lose 0.88 -> 0.72:
# which of the two options harms there, and from which width on, is not known yet.
_CPU: Options = {
    # Vectors of 512 bits where the processor has them; XLA by default takes 256.
    "xla_cpu_prefer_vector_width": 512,
    # What stands around a product or a sum is not fused into the library's call, for which XLA would write out its
    # inputs: the scale of a norm repeated for every position.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}
_OF_PLATFORM: Mapping[str, Options] = {
    "gpu": _GPU,
    "cpu": _CPU if jaxlib.__version__.startswith("0.10.") else {},
}

# What XLA says of an option that it does not have, or of a value that it does not take.
_REFUSAL = re.compile(r"No such compile option: '?(\w+)'?|While setting option (\w+), (.*)")


def step_options(platform: str) -> dict[str, bool | int | str]:
    """The options for the devices of this platform (cpu | gpu | tpu), without those that XLA_FLAGS sets."""
    asked = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in _OF_PLATFORM.get(platform, {}).items() if name not in asked}


def described(options: Options) -> str | None:
    """The options, and the user's XLA_FLAGS, as the start of a run prints them; None: there are none."""
    parts = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags:
        parts.append(f"XLA_FLAGS={flags}")
    return ", ".join(parts) or None


@contextlib.contextmanager
def readable_refusals() -> Iterator[None]:
    """Raise UserError where the compiler refuses an option while a step is compiled inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        refusal = _REFUSAL.search(str(error))
        if refusal is None:
            raise
        name, why = refusal[1] or refusal[2], refusal[3] or "this XLA has no such option"
        raise UserError(
            f"{name}: refused by the compiler of JAX {jax.__version__}: {why}; set it in XLA_FLAGS to another value, "
            "or take it out of hybridnorm_jax/training/xla_options.py"
        ) from error
