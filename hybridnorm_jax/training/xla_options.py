"""What XLA's compiler is told about the training step and the initial state, by platform: the one place for it.

They are options of those programs and not XLA_FLAGS. So they hold however training is started, reach no other
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
# On CPUs, with the XLA that it was tried with; the next one may have another name, or no need of it. Single steps in
# turns in one process, on two cores of a Xeon with AVX-512, 2026-11-27: quickstart 174.2 ms without and 173.9 with,
# lab 69.4 and 67.3, 8 layers of width 512 2,076 and 2,102. What is compared here was measured in one process.
# xla_cpu_experimental_ynn_fusion_type, what XLA gives to its library, is left alone. With DOT and REDUCE width 512
# took 2,540 ms instead of 2,043: the sums are what harms, perhaps because XLA writes out what they read. With DOT
# alone (and 512 bits on both sides) quickstart took 172.2 instead of 173.9, lab 71.2 instead of 67.3 and width 512
# 2,144 instead of 2,102, and with nothing (at XLA's 256 bits) width 512 2,167 instead of 2,081. ELTWISE is worse, and
# so is xla_cpu_use_fusion_emitters=false. At quickstart no effect was seen of
# _enable_concurrency_optimized_scheduler=false, _use_onednn, _enable_fast_min_max and
# _copy_insertion_use_region_analysis.
_CPU: Options = {
    # Vectors of 512 bits where the processor has them; XLA by default takes 256.
    "xla_cpu_prefer_vector_width": 512,
}
_HAS_CPU_OPTIONS = jaxlib.__version__.startswith("0.10.")
_OF_PLATFORM: Mapping[str, Options] = {"gpu": _GPU, "cpu": _CPU if _HAS_CPU_OPTIONS else {}}
# The program of the initial state runs once. Quickstart's compiles in 1.5 s instead of 2.0, and draws the same bits.
_OF_INITIAL_STATE: Mapping[str, Options] = {
    "cpu": {"xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE"} if _HAS_CPU_OPTIONS else {}
}

# What XLA says of an option that it does not have, or of a value that it does not take.
_REFUSAL = re.compile(r"No such compile option: '?(\w+)'?|While setting option (\w+), (.*)")


def step_options(platform: str) -> dict[str, bool | int | str]:
    """The options for the devices of this platform (cpu | gpu | tpu), without those that XLA_FLAGS sets."""
    return _not_asked_for(_OF_PLATFORM.get(platform, {}))


def initial_state_options(platform: str) -> dict[str, bool | int | str]:
    """As step_options, for the program that makes the initial state."""
    return _not_asked_for(_OF_INITIAL_STATE.get(platform, {}))


def _not_asked_for(options: Options) -> dict[str, bool | int | str]:
    asked = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in options.items() if name not in asked}


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
