"""What watching costs: python benchmarks/watch.py [FILE.yaml] [key=value ...] [--every N] [--json].

A training step and the watch of train.watch_every take turns in this process on random tokens; both are waited for. The
cost is what a watch every N steps adds to N steps: median over rounds of seconds of a watch / (N * seconds of a step).
By default configs/benchmark.yaml and N = 100.
"""

import argparse
import json
import os
import sys

import jax
import numpy as np
from equivalence import measure, positive
from train_step import Ours

from hybridnorm_jax.commands.main import exit_status
from hybridnorm_jax.config.arguments import parse

DEFAULT = "benchmark"


def main(words: list[str]) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="FILE.yaml key=value", help="as for train.py")
    parser.add_argument("--every", type=positive, default=100, metavar="N", help="steps between watches (default 100)")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each (default 7)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_intermixed_args(words)
    return exit_status(lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    ours = Ours(parse(options.words, DEFAULT))

    def step():
        ours()
        return ours.state.step

    steps = {"step": step, "watch": lambda: ours.program.watch(ours.state, ours.batch)["stream_rms"]}
    times = measure(steps, options.rounds)
    lower, cost, upper = np.percentile(times["watch"] / times["step"] / options.every, [25, 50, 75]).tolist()
    seconds = {f"{name}_seconds": float(np.median(values)) for name, values in times.items()}
    result = {"every": options.every, "cost": cost, "cost_quartiles": [lower, upper], **seconds, "jax": jax.__version__}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"step {1e3 * seconds['step_seconds']:,.1f} ms, watch {1e3 * seconds['watch_seconds']:,.1f} ms (medians)")
    shares = f"{100 * cost:.2f} % ({100 * lower:.2f}-{100 * upper:.2f})"
    print(f"a watch every {options.every} steps adds {shares} to their time")
    print(f"{os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
