"""How fast tokens are written: python benchmarks/generation.py [CONFIG] [key=value ...] [--transformers].

Generates after prompts of --prompt tokens, --new tokens each, always the likeliest, for each batch size. The parameters
are fresh: which tokens come does not matter, and nothing ends early. A turn is one call of hn.generate from prompts to
tokens; what was compiled before is not compiled again. tokens/s are those of all sequences together, at the median turn
and at the fastest one. compile_seconds is what the first call takes longer than the median one.

--transformers writes the same model with hn.save_huggingface and times its `generate` in turns with ours: greedy, with
a static cache. It needs torch and transformers, and a scheme that a transformers architecture expresses, such as pre.
On a machine with other work torch is faster with --torch-threads 1, as its threads wait for each other.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from command_line import aligned, machine, machine_line, make_parser, number_text, positive, print_result, run_main

from hybridnorm_jax.generation.generate import generate
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.lab.turns import quartiles, turn_orders
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.planning.compilation import read_config

Turn = Callable[[], int]


def fresh_params(config: ModelConfig) -> Any:
    """Random parameters; norms' scales are 1."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(shape.shape, shape.dtype)
        return (0.02 * rng.standard_normal(shape.shape)).astype(shape.dtype)

    return jax.tree.map_with_path(leaf, abstract_params(config))


def ours(config: ModelConfig, params: Any, prompts: np.ndarray, new: int) -> Turn:
    """A turn of hn.generate; returns how many tokens it wrote."""
    params = jax.device_put(params)
    return lambda: sum(map(len, generate(config, params, list(prompts), max_new_tokens=new)))


def theirs(config: ModelConfig, params: Any, prompts: np.ndarray, new: int, threads: int | None) -> Turn:
    """A turn of transformers' generate with a static cache."""
    import torch
    from transformers import AutoModelForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        save_huggingface(f"{directory}/model", config, params)
        model = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32).eval()
    tokens = torch.as_tensor(prompts)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def turn() -> int:
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
            )
        return (out.shape[1] - tokens.shape[1]) * len(out)

    return turn


def measure(turns: dict[str, Turn], rounds: int) -> dict[str, dict[str, Any]]:
    """Time every contestant in turns."""
    first, seconds, counts = {}, {name: [] for name in turns}, {}
    for name, turn in turns.items():
        first[name], counts[name] = _timed(turn)
        _timed(turn)
    for order in turn_orders(list(turns), rounds):
        for name in order:
            seconds[name].append(_timed(turns[name])[0])
    return {name: _row(first[name], np.array(seconds[name]), counts[name]) for name in turns}


def _timed(turn: Turn) -> tuple[float, int]:
    start = time.perf_counter()
    count = turn()
    return time.perf_counter() - start, count


def _row(first: float, seconds: np.ndarray, count: int) -> dict[str, Any]:
    found = quartiles(seconds)
    return {
        "tokens": count,
        "tokens_per_second": round(count / found.median, 1),
        "tokens_per_second_quartiles": [round(count / found.upper, 1), round(count / found.lower, 1)],
        "tokens_per_second_best": round(count / seconds.min(), 1),
        "compile_seconds": round(first - found.median, 2),
    }


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("config", nargs="*", default=[])
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=positive, default=16, help="tokens of a prompt (default 16)")
    parser.add_argument("--new", type=positive, default=256, help="tokens to write (default 256)")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each contestant (default 7)")
    parser.add_argument("--transformers", action="store_true", help="transformers' generate of the same model, too")
    parser.add_argument("--torch-threads", type=positive, help="of transformers' side (default: as torch chooses)")
    options = parser.parse_args(arguments)
    config = read_config(options.config or ["quickstart"]).model
    before = os.getloadavg()[0]
    rows = _rows(config, options)
    result = {**machine(), "loads": [before, os.getloadavg()[0]], "rows": rows}
    print_result(result, report, as_json=options.json)


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [("batch", "of", "tokens/s", "quartiles", "best", "compile s")]
    for row in result["rows"]:
        for name in (name for name in row if name != "batch"):
            found = row[name]
            spread = "-".join(number_text(value) for value in found["tokens_per_second_quartiles"])
            numbers = found["tokens_per_second"], found["tokens_per_second_best"], found["compile_seconds"]
            rate, best, seconds = map(number_text, numbers)
            lines.append((str(row["batch"]), name, rate, spread, best, seconds))
    loads = " to ".join(f"{load:.1f}" for load in result["loads"])
    return "\n".join([f"{machine_line(result)}, load {loads}", *aligned(lines)])


def _rows(config: ModelConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    params, rng = fresh_params(config), np.random.default_rng(1)
    rows = []
    for batch in options.batch:
        prompts = rng.integers(0, config.vocab_size, (batch, options.prompt))
        turns = {"ours": ours(config, params, prompts, options.new)}
        if options.transformers:
            turns["transformers"] = theirs(config, params, prompts, options.new, options.torch_threads)
        rows.append({"batch": batch, **measure(turns, options.rounds)})
    return rows


if __name__ == "__main__":
    run_main(main)
