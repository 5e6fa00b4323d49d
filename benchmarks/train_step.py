"""Time a whole training step: python benchmarks/train_step.py [CONFIG] [key=value ...] [--peer] [--depths 12 96].

By default of the configuration `benchmark`. A step is forward, loss, backward, clipping and AdamW on random tokens that
lie on the device. Step times are medians after warm-up; every step is waited for. MFU counts causal attention by half
and no rematerialization, over the bfloat16 peak of all devices (training/throughput.py).

--peer times the same shape, precision and step in PyTorch's transformers (Olmo2), in turns with ours in this process.
--depths times the compilation of the step instead, at these numbers of layers, and gives the ratio of last and first.
"""

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from command_line import make_parser, number_text, positive, print_result, run_main

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token, tokens_per_second

DEFAULT = "benchmark"


# ---- What takes a step


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """Tokens, targets and weights of one step."""
    train = config.train
    shape = (train.grad_accumulation, config.microbatch_size, train.seq_len + 1)
    stream = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    tokens, targets = stream[..., :-1], stream[..., 1:]
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


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


class Peer:
    """Olmo2 of transformers: the same widths and depth, AdamW and clipping, eager PyTorch with fused attention.

    Raises:
      UserError: torch or transformers is not installed.
    """

    def __init__(self, config: RunConfig):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"--peer needs torch and transformers: {error}") from error
        model, self.torch = config.model, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        sizes = transformers.Olmo2Config(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.mlp_dim,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=config.train.seq_len,
            tie_word_embeddings=model.tie_embeddings,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = transformers.Olmo2ForCausalLM(sizes).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.b1, config.optimizer.b2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.computes_in_bfloat16 = model.dtype == "bfloat16"
        self.microbatches = [
            torch.tensor(part, dtype=torch.long).to(self.device) for part in random_batch(config)["tokens"]
        ]

    def __call__(self) -> None:
        torch = self.torch
        for tokens in self.microbatches:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.computes_in_bfloat16):
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(self.microbatches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device


# ---- Measuring


def step_times(config: RunConfig, *, with_peer: bool, rounds: int, per_round: int) -> dict[str, Any]:
    """What a step of this configuration costs."""
    ours = Ours(config)
    contestants: dict[str, Callable[[], None]] = {"ours": ours}
    if with_peer:
        contestants["peer"] = Peer(config)
    times = measure_single_steps(contestants, rounds, per_round)
    result = _our_result(config, ours, times["ours"])
    if with_peer:
        median, of_peer = statistics.median(times["ours"]), statistics.median(times["peer"])
        result["peer step seconds, median"] = of_peer
        result["peer tokens per second"] = tokens_per_second(times["peer"], config.tokens_per_step)
        result["ours / peer, tokens per s"] = of_peer / median
    return result


def measure_single_steps(
    steps: Mapping[str, Callable[[], None]], rounds: int, per_round: int
) -> dict[str, list[float]]:
    """Seconds of single steps, in turns of `per_round` steps.

    Two steps of each come first. The first step of a turn warms caches and is not timed.
    """
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name] += [_seconds(step) for _ in range(per_round)]
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
    parser.add_argument("--peer", action="store_true", help="PyTorch's step, too")
    parser.add_argument("--depths", type=positive, nargs="+", metavar="LAYERS", help="compile times instead")
    parser.add_argument("--rounds", type=positive, default=7, help="turns (default 7)")
    parser.add_argument("--per-round", type=positive, default=3, help="timed steps per turn (default 3)")
    options, settings = parser.parse_known_args(arguments)
    config = parse(settings, DEFAULT)
    if options.depths:
        result = compile_times(config, options.depths)
    else:
        result = step_times(config, with_peer=options.peer, rounds=options.rounds, per_round=options.per_round)
    print_result(result, report, as_json=options.json)


if __name__ == "__main__":
    run_main(main)
