"""Time a whole training step: python benchmarks/train_step.py [CONFIG] [key=value ...] [--peer] [--depths 12 96].

By default of the configuration `benchmark`. A step is forward, loss, backward, clipping and AdamW on random tokens that
lie on the device. Step times are medians after warm-up; every step is waited for. MFU counts causal attention by half
and no rematerialization, over the bfloat16 peak of all devices (training/throughput.py).

--peer compares with the same shape, precision and step in PyTorch's transformers (Olmo2): of the configuration that is
named, or of quickstart, lab and benchmark. A duel is two fresh processes that compute in turns; ours has its memory and
its layers as `python train.py` has them, theirs is as it comes. Medians of several duels are what counts: single ones
differ by a tenth or more.

--depths times the compilation of the step instead, at these numbers of layers, and gives the ratio of last and first.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import contestants
import jax
from command_line import make_parser, number_text, positive, print_result, run_main
from contestants import random_batch

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token, tokens_per_second

DEFAULT = "benchmark"
# What --peer compares where no configuration is named, and how long a turn is.
SHAPES, TURN_SECONDS = ("quickstart", "lab", "benchmark"), 1.0


# ---- What takes a step


class CompiledStep(NamedTuple):
    """A training step, and how long it took to trace, lower and compile it."""

    executable: jax.stages.Compiled
    seconds: float


def compile_step(program: Program) -> CompiledStep:
    """Compile the step of a program, without the compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    begin = time.perf_counter()
    executable = program.lower_train_step().compile()
    return CompiledStep(executable=executable, seconds=time.perf_counter() - begin)


class Ours:
    """Our step, ready to be called."""

    def __init__(self, config: RunConfig):
        self.program = Program(config)
        compiled = compile_step(self.program)
        self.compile_seconds = compiled.seconds
        self.memory = compiled.executable.memory_analysis()
        self.state = self.program.fresh_state()
        self.batch = random_batch(config)

    def __call__(self) -> None:
        self.state, metrics = self.program.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


# ---- Measuring


def step_times(config: RunConfig, *, rounds: int, per_round: int) -> dict[str, Any]:
    """What a step of this configuration costs."""
    ours = Ours(config)
    return _our_result(config, ours, measure_single_steps(ours, rounds, per_round))


def measure_single_steps(step: Callable[[], None], rounds: int, per_round: int) -> list[float]:
    """Seconds of single steps, in turns of `per_round` steps.

    Two steps come first. The first step of a turn warms caches and is not timed.
    """
    step()
    step()
    times: list[float] = []
    for _ in range(rounds):
        step()
        times += [_seconds(step) for _ in range(per_round)]
    return times


def _seconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _our_result(config: RunConfig, ours: Ours, times: Sequence[float]) -> dict[str, Any]:
    mesh = ours.program.mesh
    device = mesh.devices.flat[0]
    median = statistics.median(times)
    rate = tokens_per_second(times, config.tokens_per_step)
    flops = model_flops_per_token(config.model, config.train.seq_len)
    device_peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "scheme": config.model.scheme,
        "device": f"{mesh.size} x {device.device_kind}",
        "attention": ours.program.backend,
        "dtype": config.model.dtype,
        "tokens per step": config.tokens_per_step,
        "step seconds, median": median,
        "step seconds, min and max": [min(times), max(times)],
        "tokens per second": rate,
        "MFU (causal, bfloat16 peak)": mfu(rate, flops, device.device_kind, mesh.size),
        "compile seconds": ours.compile_seconds,
        "arguments, MB per device": ours.memory.argument_size_in_bytes / 1e6,
        "temporaries, MB per device": ours.memory.temp_size_in_bytes / 1e6,
        "device peak, MB": None if device_peak is None else device_peak / 1e6,
        "process peak, MB": process_peak / 1e6,
    }


def compile_times(config: RunConfig, depths: Sequence[int]) -> dict[str, Any]:
    """Seconds to compile the step at each number of layers, scanned one layer at a time."""
    medians = []
    for depth in depths:
        model = dataclasses.replace(config.model, num_layers=depth, scan_unroll=1)
        deeper = dataclasses.replace(config, model=model)
        medians.append(statistics.median(compile_step(Program(deeper)).seconds for _ in range(3)))
    result = {f"compile seconds, {depth} layers": median for depth, median in zip(depths, medians, strict=True)}
    result["last / first"] = medians[-1] / medians[0]
    return result


# ---- Reporting


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    return "\n".join(f"{name:<28} {_text(value)}" for name, value in result.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(number_text(number) for number in value)
    return number_text(value)


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for and print it."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action="store_true", help="against PyTorch, in duels")
    parser.add_argument("--duels", type=positive, default=5, help="duels of --peer (default 5)")
    parser.add_argument("--turns", type=positive, default=4, help="turns of a duel (default 4)")
    parser.add_argument("--peer-tunables", default="", metavar="TEXT", help="GLIBC_TUNABLES of PyTorch (default unset)")
    parser.add_argument("--depths", type=positive, nargs="+", metavar="LAYERS", help="compile times instead")
    parser.add_argument("--rounds", type=positive, default=7, help="turns (default 7)")
    parser.add_argument("--per-round", type=positive, default=3, help="timed steps per turn (default 3)")
    options, settings = parser.parse_known_args(arguments)
    if options.peer:
        _print_contests([settings] if settings else [[shape] for shape in SHAPES], options)
        return
    config = parse(settings, DEFAULT)
    if options.depths:
        result = compile_times(config, options.depths)
    else:
        result = step_times(config, rounds=options.rounds, per_round=options.per_round)
    print_result(result, report, as_json=options.json)


def _print_contests(settings: Sequence[Sequence[str]], options: argparse.Namespace) -> None:
    results = [
        contestants.contest(
            setting,
            duels=options.duels,
            turns=options.turns,
            seconds=TURN_SECONDS,
            peer_tunables=options.peer_tunables,
        )
        for setting in settings
    ]
    print(json.dumps(results, indent=2) if options.json else contestants.report(results))


if __name__ == "__main__":
    run_main(main)
