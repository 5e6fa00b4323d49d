"""What a mixture of experts costs: python benchmarks/moe.py [CONFIG] [key=value ...] [--skew] [--dispatches ...].

The layer alone, forward, and forward with backward (gradients of all parameters and of the input): router and experts
by each dispatch on the same parameters, and one dense SwiGLU FeedForward as wide as a token's experts together, which
multiplies as much. Parameters lie in float32 and are cast in the layer, as in training; the router's losses are left
out. One device, whatever the mesh. Without --shape 2048 tokens, embed 512, mlp 256 (of one expert), 64 experts, top 8:

--shape        these instead: tokens, embed, mlp, experts, experts per token; may be repeated
--olmoe        MoE-1B-7B's layer, 4 x 4096 tokens; for an accelerator
--skew         after random parameters, which choose the experts about evenly, some that leave a quarter of them empty
--dispatches   default: all that run here, but ragged not on a CPU, where it is slow and large

The whole training step of a mixture of experts, by default of the configuration `moe_benchmark` (keys are those of
`hybridnorm train`): with its own dispatch, with the dense one, and of a dense model with the same active parameters.
Where the mesh splits the experts, the dense model's parameters are split over as many devices by fsdp.

All contestants of a table take turns in this process, a turn being one call or several short ones, waited for at its
end; two calls and a turn go before what is timed. Milliseconds and ratios are medians over rounds with quartiles; a
ratio is that to the dispatch that auto stands for (a step's: to its own), round by round: 5 in dense's row says that
dense takes five times as long. FLOP/s are those of the active parameters' products, 2 for each parameter and token
forward and 6 with backward, and a step's as in training/throughput.py; "of peak" is over the bfloat16 peak of the
devices, in float32 too. Temporaries are what the compiled program needs beside arguments and results. Off by: largest
difference from the dense dispatch in float32 at the highest matmul precision, over the largest number there, of the
result and of each gradient, computed from the same choice of experts on this device; in dense's own row it is the
rounding alone. What the device's memory is too small for is named and left out.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from command_line import machine, make_parser, positive, print_result, run_main
from moe_layers import (
    OLMOE,
    SMALL,
    Layer,
    LayerArrays,
    LayerOptions,
    Shape,
    active_weights,
    admit,
    differences,
    draw,
    layer_function,
    make_modules,
    route,
)
from moe_report import DENSE_MODEL, MODES, report
from train_step import Ours

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import check
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.kernels.backend_names import EXPERT_DISPATCHES
from hybridnorm_jax.kernels.expert_dispatch import resolve_dispatch
from hybridnorm_jax.lab.turns import measure, quartiles
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token, tokens_per_second

DEFAULT = "moe_benchmark"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      config: whose training step is measured; None: no training step is.
      shapes: of the layers that are measured.
      skew: whether each shape is also measured with an uneven choice of experts.
      layers: what all layers share.
      rounds: turns of each contestant.
      as_json: whether the result is printed as JSON.
    """

    config: RunConfig | None
    shapes: tuple[Shape, ...]
    skew: bool
    layers: LayerOptions
    rounds: int
    as_json: bool


def run(asked: Request) -> dict[str, Any]:
    """Measure everything that the command line asks for."""
    # The step comes first: a wrong key then ends the benchmark before the layers have taken minutes.
    step = None if asked.config is None else step_result(asked.config, asked.rounds)
    layers = []
    for shape in asked.shapes:
        layers.append(LayerContest(shape, asked.layers, skew=False).result(asked.rounds))
        if asked.skew:
            layers.append(LayerContest(shape, asked.layers, skew=True).result(asked.rounds))
    return machine() | {"rounds": asked.rounds, "layers": layers, "step": step}


# ---- The layer


class LayerContest:
    """One layer by all contestants.

    Attributes:
      left_out: a line for everything that the device's memory is too small for.
    """

    def __init__(self, shape: Shape, options: LayerOptions, *, skew: bool):
        self.shape, self.options, self.skew = shape, options, skew
        self.modules = make_modules(shape, options)
        self.arrays = draw(shape, self.modules, skew=skew)
        self.left_out: dict[str, str] = {}

    def result(self, rounds: int) -> dict[str, Any]:
        """Times, memory and differences."""
        routed = route(self.arrays, self.shape.k)
        sizes = np.bincount(np.asarray(routed.chosen).ravel(), minlength=self.shape.experts)
        off_by = differences(routed, self.options, self.left_out)
        rows = {mode: self._rows(mode, off_by, rounds) for mode in MODES}
        return {
            **self.shape._asdict(),
            "shared": self.options.shared,
            "dtype": self.options.dtype,
            "routing": "skewed" if self.skew else "even",
            "empty_experts": int((sizes == 0).sum()),
            "largest_group_over_mean": float(sizes.max() / sizes.mean()),
            "left_out": self.left_out,
            **rows,
        }

    def _rows(self, mode: str, off_by: Mapping[str, Mapping[str, float]], rounds: int) -> dict[str, dict[str, Any]]:
        """Contestant -> its row in this mode."""

        def build(name: str) -> CompiledLayer:
            layer = CompiledLayer(self.modules[name], mode, self.arrays.params(name), self.arrays)
            jax.block_until_ready(layer())
            return layer

        entrants = admit(self.modules, build, self.left_out, prefix=f"{mode} ")
        flops = {
            name: MODES[mode].flops * active_weights(self.shape, self.options.shared, name) for name in self.modules
        }
        base = resolve_dispatch("auto", platform=jax.default_backend(), dtype=self.options.dtype)
        work = Work(tokens=self.shape.tokens, flops=flops, devices=1)
        rows = timings(entrants, rounds, base=base, work=work)
        for name, row in rows.items():
            row["temporaries_mb"] = entrants[name].temporaries_mb
            row["off_by"] = {
                part: value for part, value in off_by.get(name, {}).items() if part == "y" or mode == "forward_backward"
            }
        return rows


class CompiledLayer:
    """A layer in one mode, compiled and ready to be called."""

    def __init__(self, module: Layer, mode: str, params: Any, arrays: LayerArrays):
        function = jax.jit(layer_function(module, mode))
        self.compiled = function.lower(params, arrays.x, arrays.cotangent).compile()
        self.temporaries_mb = self.compiled.memory_analysis().temp_size_in_bytes / 1e6
        self.params, self.x, self.cotangent = params, arrays.x, arrays.cotangent

    def __call__(self) -> Any:
        return self.compiled(self.params, self.x, self.cotangent)


# ---- The training step


def step_result(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Times and memory of the training step."""
    experts = config.model.num_experts
    check(experts > 0, "model.num_experts", experts, f"must be above 0, or name no configuration, for {DEFAULT}")
    program = Program(config)
    configs = {
        program.dispatch: config,
        "dense": dataclasses.replace(config, model=dataclasses.replace(config.model, expert_dispatch="dense")),
        DENSE_MODEL: dense_config(config, program.mesh),
    }
    for other in configs.values():
        Program(other)  # refuses what cannot be before anything is compiled
    left_out: dict[str, str] = {}

    def build(name: str) -> Ours:
        step = Ours(configs[name])
        step()
        return step

    entrants = admit(configs, build, left_out)
    rows = timings(
        {name: functools.partial(_step_and_params, step) for name, step in entrants.items()},
        rounds,
        base=program.dispatch,
        work=Work(
            tokens=config.tokens_per_step,
            flops={name: model_flops_per_token(other.model, other.train.seq_len) for name, other in configs.items()},
            devices=program.mesh.size,
        ),
    )
    for name, row in rows.items():
        step = entrants[name]
        params = jax.tree.leaves(step.program.abstract_state.params)
        row["arguments_mb"] = step.memory.argument_size_in_bytes / 1e6
        row["temporaries_mb"] = step.memory.temp_size_in_bytes / 1e6
        row["compile_seconds"] = step.compile_seconds
        row["parameters"] = sum(leaf.size for leaf in params)
    return {
        "model": dataclasses.asdict(config.model),
        "mesh": dict(program.mesh.shape),
        "tokens": config.tokens_per_step,
        "left_out": left_out,
        "train_step": rows,
    }


def dense_config(config: RunConfig, mesh: jax.sharding.Mesh) -> RunConfig:
    """The dense model of the same active parameters, its own split over fsdp where `mesh` splits the experts."""
    model = config.model
    dense = dataclasses.replace(
        model,
        num_experts=0,
        experts_per_token=None,
        normalize_expert_weights=False,
        shared_experts=0,
        balance_bias=False,
        mlp_dim=(model.experts_per_token + model.shared_experts) * model.mlp_dim,
    )
    sizes = dict(mesh.shape)
    sizes["fsdp"] *= sizes["expert"]
    sizes["expert"] = 1
    return dataclasses.replace(config, model=dense, mesh=dataclasses.replace(config.mesh, **sizes))


def _step_and_params(step: Ours) -> Any:
    """Make a step; returns the parameters, which measure() checks to be finite."""
    step()
    return step.state.params


# ---- Measuring


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of each contestant does.

    Attributes:
      flops: contestant -> FLOPs for each token.
      devices: how many compute together.
    """

    tokens: int
    flops: dict[str, float]
    devices: int


def timings(steps: Mapping[str, Callable[[], Any]], rounds: int, *, base: str, work: Work) -> dict[str, dict[str, Any]]:
    """Contestant -> its seconds, their ratio to those of `base` in the same round, and rates.

    Args:
      base: a contestant; where it is not there, the first one takes its place.
    """
    if not steps:
        return {}
    times = measure(steps, rounds)
    base = base if base in times else next(iter(times))
    kind = jax.devices()[0].device_kind
    rows = {}
    for name, values in times.items():
        seconds = quartiles(values)
        ratio = quartiles(values / times[base])
        rate = tokens_per_second(values, work.tokens)
        rows[name] = {
            "seconds": seconds.median,
            "seconds_quartiles": [seconds.lower, seconds.upper],
            "base": base,
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.lower, ratio.upper],
            "tokens_per_second": rate,
            "flops_per_second": rate * work.flops[name],
            "peak_fraction": mfu(rate, work.flops[name], kind, work.devices),
        }
    return rows


# ---- The command line


def read(arguments: Sequence[str]) -> Request:
    """What is asked for.

    Raises:
      UserError: it cannot be measured.
    """
    parser = _parser()
    options, settings = parser.parse_known_args(arguments)
    config = parse(settings, DEFAULT)
    if options.layer_only and settings:
        raise UserError(f"{settings[0]}: with --layer-only no configuration is measured; leave it out")
    check(options.shared >= 0, "--shared", options.shared, "must not be negative")
    return Request(
        config=None if options.layer_only else config,
        shapes=() if options.step_only else _shapes(options),
        skew=options.skew,
        layers=LayerOptions(dispatches=_dispatches(options), shared=options.shared, dtype=options.dtype),
        rounds=options.rounds,
        as_json=options.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer-only", action="store_true", help="not the training step")
    which.add_argument("--step-only", action="store_true", help="not the layer")
    parser.add_argument("--shape", type=positive, nargs=5, action="append", default=[], metavar=Shape._fields)
    parser.add_argument("--olmoe", action="store_true", help="MoE-1B-7B's layer, 4 x 4096 tokens")
    parser.add_argument("--shared", type=int, default=0, help="shared experts of the layer (default 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the layer")
    parser.add_argument("--skew", action="store_true", help="an uneven choice of experts, too")
    parser.add_argument("--dispatches", nargs="+", metavar="NAME", help=", ".join(EXPERT_DISPATCHES))
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each contestant (default 7)")
    return parser


def _shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    shapes = [Shape._make(sizes) for sizes in options.shape]
    if options.olmoe:
        shapes.append(OLMOE)
    for shape in shapes:
        check(shape.k <= shape.experts, "--shape", " ".join(map(str, shape)), "more experts per token than experts")
    return tuple(shapes) or (SMALL,)


def _dispatches(options: argparse.Namespace) -> tuple[str, ...]:
    platform = jax.default_backend()
    names = options.dispatches
    if names is None:
        also = {"gpu": ["ragged"], "tpu": ["ragged", "gmm"]}
        names = ["dense", "blocked", *also.get(platform, [])]
    resolved = [resolve_dispatch(name, platform=platform, dtype=options.dtype) for name in names]
    return tuple(dict.fromkeys(resolved))


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for and print it."""
    asked = read(arguments)
    print_result(run(asked), report, as_json=asked.as_json)


if __name__ == "__main__":
    run_main(main)
