"""Time a whole training step: python benchmarks/train_step.py [FILE.yaml] [key=value ...] [--peer] [--depths 12 96].

Without a file, configs/benchmark.yaml. A step is forward, loss, backward, clipping and AdamW on random tokens that lie
on the device. Step times are medians after warm-up; every step is waited for. MFU counts causal attention by half and
no rematerialization, over the bfloat16 peak of all devices (training/throughput.py).

--peer     the same shape, precision and step in PyTorch's transformers (Olmo2), in turns with ours in this process
--depths   compile times of the step at these numbers of layers, and their ratio
--json     one JSON object on standard output
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import time

import jax
import numpy as np

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token

DEFAULT = "benchmark"


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """Tokens, targets and weights of one step."""
    train = config.train
    shape = (train.grad_accumulation, config.microbatch_size, train.seq_len + 1)
    stream = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    tokens, targets = stream[..., :-1], stream[..., 1:]
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


def seconds(step) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def compile_seconds(program: Program) -> tuple[float, jax.stages.Compiled]:
    """Tracing, lowering and compiling the step, the compilation cache left aside."""
    jax.config.update("jax_enable_compilation_cache", False)
    begin = time.perf_counter()
    compiled = program.lower_train_step().compile()
    return time.perf_counter() - begin, compiled


class Ours:
    """Our step, ready to be called."""

    def __init__(self, config: RunConfig):
        self.program = Program(config)
        self.compile_seconds, compiled = compile_seconds(self.program)
        self.memory = compiled.memory_analysis()
        self.state = self.program.fresh_state()
        self.batch = random_batch(config)

    def __call__(self) -> None:
        self.state, metrics = self.program.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


class Peer:
    """Olmo2 of transformers: the same widths and depth, AdamW and clipping, eager PyTorch with fused attention."""

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
        opt = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=opt.learning_rate,
            betas=(opt.b1, opt.b2),
            weight_decay=opt.weight_decay,
            fused=True,
        )
        self.bfloat16 = model.dtype == "bfloat16"
        self.microbatches = [
            torch.tensor(part, dtype=torch.long).to(self.device) for part in random_batch(config)["tokens"]
        ]

    def __call__(self) -> None:
        torch = self.torch
        for tokens in self.microbatches:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(self.microbatches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device


def measure(steps: dict, rounds: int, per_round: int) -> dict[str, list[float]]:
    """Seconds of single steps, the contestants taking turns; the first step of a turn warms caches and is dropped."""
    for step in steps.values():
        step()
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name] += [seconds(step) for _ in range(per_round)]
    return times


def main(words: list[str]) -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--depths", type=int, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--per-round", type=int, default=3, help="timed steps per turn (default 3)")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(words)
    config = parse(rest, default=DEFAULT)
    result = compile_times(config, options.depths) if options.depths else step_times(config, options)
    print(
        json.dumps(result) if options.json else "\n".join(f"{name:<28} {show(value)}" for name, value in result.items())
    )


def step_times(config: RunConfig, options: argparse.Namespace) -> dict:
    """What a step of this configuration costs."""
    ours = Ours(config)
    contestants = {"ours": ours} | ({"peer": Peer(config)} if options.peer else {})
    times = measure(contestants, options.rounds, options.per_round)
    median = statistics.median(times["ours"])
    device, mesh = ours.program.mesh.devices.flat[0], ours.program.mesh
    rate = config.tokens_per_step / median
    stats = device.memory_stats() or {}
    result = {
        "scheme": config.model.scheme,
        "device": f"{mesh.size} x {device.device_kind}",
        "attention": ours.program.backend,
        "dtype": config.model.dtype,
        "tokens per step": config.tokens_per_step,
        "step seconds, median": median,
        "step seconds, min and max": [min(times["ours"]), max(times["ours"])],
        "tokens per second": rate,
        "MFU (causal, bfloat16 peak)": mfu(
            rate, model_flops_per_token(config.model, config.train.seq_len), device.device_kind, mesh.size
        ),
        "compile seconds": ours.compile_seconds,
        "arguments, MB per device": ours.memory.argument_size_in_bytes / 1e6,
        "temporaries, MB per device": ours.memory.temp_size_in_bytes / 1e6,
        "device peak, MB": stats["peak_bytes_in_use"] / 1e6 if "peak_bytes_in_use" in stats else None,
        "process peak, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    if options.peer:
        peer = statistics.median(times["peer"])
        result["peer step seconds, median"] = peer
        result["peer tokens per second"] = config.tokens_per_step / peer
        result["ours / peer, tokens per s"] = peer / median
    return result


def compile_times(config: RunConfig, depths: list[int]) -> dict:
    """Seconds to compile the step at each number of layers, scanned one layer at a time."""
    result = {}
    for depth in depths:
        model = dataclasses.replace(config.model, num_layers=depth, scan_unroll=1)
        times = [compile_seconds(Program(dataclasses.replace(config, model=model)))[0] for _ in range(3)]
        result[f"compile seconds, {depth} layers"] = statistics.median(times)
    values = list(result.values())
    result["last / first"] = values[-1] / values[0]
    return result


def show(value) -> str:
    """A value for people."""
    if isinstance(value, list):
        return " to ".join(map(show, value))
    if value is None:
        return "unknown"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and value < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
