"""What watching costs: python benchmarks/watch.py [CONFIG] [key=value ...] [--every N] [--json].

A training step and the watch of train.watch_every take turns in this process on random tokens; both are waited for. The
cost is what a watch every N steps adds to N steps: median over rounds of seconds of a watch / (N * seconds of a step).
By default the configuration `benchmark`, and N = 100.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from command_line import machine, machine_line, make_parser, positive, print_result, run_main
from train_step import Ours

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.lab.turns import measure, quartiles

DEFAULT = "benchmark"


def run(config: RunConfig, *, every: int, rounds: int) -> dict[str, Any]:
    """Measure a step and a watch of this configuration."""
    ours = Ours(config)

    def step() -> jax.Array:
        ours()
        return ours.state.step

    def watch() -> jax.Array:
        return ours.program.watch(ours.state, ours.batch)["stream_rms"]

    times = measure({"step": step, "watch": watch}, rounds)
    cost = quartiles(times["watch"] / times["step"] / every)
    return machine() | {
        "every": every,
        "cost": cost.median,
        "cost_quartiles": [cost.lower, cost.upper],
        "step_seconds": float(np.median(times["step"])),
        "watch_seconds": float(np.median(times["watch"])),
    }


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lower, upper = result["cost_quartiles"]
    share = f"{100 * result['cost']:.2f} % ({100 * lower:.2f}-{100 * upper:.2f})"
    return "\n".join(
        [
            f"step {1e3 * result['step_seconds']:,.1f} ms, watch {1e3 * result['watch_seconds']:,.1f} ms (medians)",
            f"a watch every {result['every']} steps adds {share} to their time",
            machine_line(result),
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for and print it."""
    parser = make_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help="as for `hybridnorm train`")
    parser.add_argument("--every", type=positive, default=100, metavar="N", help="steps between watches (default 100)")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each (default 7)")
    options = parser.parse_intermixed_args(arguments)
    config = parse(options.settings, DEFAULT)
    print_result(run(config, every=options.every, rounds=options.rounds), report, as_json=options.json)


if __name__ == "__main__":
    run_main(main)
