"""What a mixture of experts costs: python benchmarks/moe.py [FILE.yaml] [key=value ...] [--skew] [--dispatches ...].

The layer alone, forward, and forward with backward (gradients of all parameters and of the input): router and experts
by each dispatch on the same parameters, and one dense SwiGLU FeedForward as wide as a token's experts together, which
multiplies as much. Parameters lie in float32 and are cast in the layer, as in training; the router's losses are left
out. One device, whatever the mesh. Without --shape 2048 tokens, embed 512, mlp 256 (of one expert), 64 experts, top 8:

--shape        these instead: tokens, embed, mlp, experts, experts per token; may be repeated
--olmoe        MoE-1B-7B's layer, 4 x 4096 tokens; for an accelerator
--skew         after random parameters, which choose the experts about evenly, some that leave a quarter of them empty
--dispatches   default: all that run here, but ragged not on a CPU, where it is slow and large

The whole training step of a mixture of experts, by default configs/moe_benchmark.yaml (model.dtype, mesh.* and so on as
for train.py): with its own dispatch, with the dense one, and of a dense model with the same active parameters. Where
the mesh splits the experts, the dense model's parameters are split over as many devices by fsdp.

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
import json
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from equivalence import measure, positive
from moe_layers import OLMOE, SMALL, Shape, active_weights, admit, differences, draw, layer_function, make_modules
from train_step import Ours, show

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.fields import check
from hybridnorm_jax.kernels.experts import resolve_dispatch
from hybridnorm_jax.kernels.names import EXPERT_DISPATCHES
from hybridnorm_jax.model.moe import choose_experts
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token

DEFAULT = "moe_benchmark"
MODES = {"forward": ("forward", 2), "forward_backward": ("both", 6)}  # title, FLOPs for each weight and token
TITLES = {"feed_forward": "dense FeedForward", "dense_model": "dense model"}


# ---- The layer


def layer_result(shape: Shape, skew: bool, options: argparse.Namespace) -> dict:
    """Times, memory and differences of one layer."""
    modules = make_modules(shape, options)
    x, cotangent, params = draw(shape, skew, modules)
    # Chosen once: in programs of their own, rounding alone could decide a tie differently.
    router = params[options.dispatches[0]]["router"]["kernel"]
    logits = jnp.matmul(x[0].astype(jnp.float32), router, precision="highest")
    weights, chosen = choose_experts(logits, shape.k)
    sizes = np.bincount(np.asarray(chosen).ravel(), minlength=shape.experts)
    result = {
        **shape._asdict(),
        "shared": options.shared,
        "dtype": options.dtype,
        "routing": "skewed" if skew else "even",
        "empty_experts": int((sizes == 0).sum()),
        "largest_group_over_mean": float(sizes.max() / sizes.mean()),
        "left_out": {},
    }
    inputs = (x[0], *(params[options.dispatches[0]][f"expert_{name}"]["kernel"] for name in ("gate", "up", "down")))
    off = differences((*inputs, weights), chosen, cotangent[0], options, result["left_out"])
    for mode, (_, flops) in MODES.items():

        def build(name, mode=mode):
            arguments = params[name], x, cotangent
            compiled = jax.jit(layer_function(modules[name], mode)).lower(*arguments).compile()
            step = functools.partial(compiled, *arguments)
            jax.block_until_ready(step())
            return step, compiled.memory_analysis().temp_size_in_bytes / 1e6

        entrants = admit(modules, build, result["left_out"], f"{mode} ")
        rows = timings(
            {name: step for name, (step, _) in entrants.items()},
            options.rounds,
            base=resolve_dispatch("auto", platform=jax.default_backend(), dtype=options.dtype),
            tokens=shape.tokens,
            flops={name: flops * active_weights(shape, options.shared, name) for name in modules},
        )
        for name, row in rows.items():
            row["temporaries_mb"] = entrants[name][1]
            row["off_by"] = {part: value for part, value in off.get(name, {}).items() if part == "y" or flops == 6}
        result[mode] = rows
    return result


# ---- The training step


def dense_config(config: RunConfig, mesh: jax.sharding.Mesh) -> RunConfig:
    """The dense model of the same active parameters, its own split over fsdp where `mesh` splits the experts."""
    model, sizes = config.model, dict(mesh.shape)
    without = {"num_experts": 0, "experts_per_token": None, "normalize_expert_weights": False, "shared_experts": 0}
    width = (model.experts_per_token + model.shared_experts) * model.mlp_dim
    sizes |= {"fsdp": sizes["fsdp"] * sizes["expert"], "expert": 1}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, **without, balance_bias=False, mlp_dim=width),
        mesh=dataclasses.replace(config.mesh, **sizes),
    )


def step_result(config: RunConfig, rounds: int) -> dict:
    """Times and memory of the training step."""
    experts, left_out = config.model.num_experts, {}
    check(experts > 0, "model.num_experts", experts, "must be above 0, or name no file for configs/moe_benchmark.yaml")
    program = Program(config)
    by_dispatch = dataclasses.replace(config.model, expert_dispatch="dense")
    configs = {program.dispatch: config, "dense": dataclasses.replace(config, model=by_dispatch)}
    configs["dense_model"] = dense_config(config, program.mesh)
    for other in configs.values():
        Program(other)  # refuses what cannot be before anything is compiled

    def build(name):
        step = Ours(configs[name])
        step()
        return step

    def parameters(step):  # measure looks whether they are finite
        step()
        return step.state.params

    entrants = admit(configs, build, left_out)
    rows = timings(
        {name: functools.partial(parameters, step) for name, step in entrants.items()},
        rounds,
        base=program.dispatch,
        tokens=config.tokens_per_step,
        flops={name: model_flops_per_token(other.model, other.train.seq_len) for name, other in configs.items()},
        devices=program.mesh.size,
    )
    for name, row in rows.items():
        memory, leaves = entrants[name].memory, jax.tree.leaves(entrants[name].program.abstract_state.params)
        row["arguments_mb"] = memory.argument_size_in_bytes / 1e6
        row["temporaries_mb"] = memory.temp_size_in_bytes / 1e6
        row["compile_seconds"] = entrants[name].compile_seconds
        row["parameters"] = sum(leaf.size for leaf in leaves)
    return {
        "model": dataclasses.asdict(config.model),
        "mesh": dict(program.mesh.shape),
        "tokens": config.tokens_per_step,
        "left_out": left_out,
        "train_step": rows,
    }


# ---- Measuring and reporting


def timings(steps: dict[str, Callable], rounds: int, *, base: str, tokens: int, flops: dict, devices: int = 1) -> dict:
    """For each contestant its seconds, their ratio to those of `base` (of the first where there is none), and rates.

    Args:
      flops: per token.
    """
    if not steps:
        return {}
    times, kind = measure(steps, rounds), jax.devices()[0].device_kind
    base = base if base in times else next(iter(times))
    rows = {}
    for name, values in times.items():
        (lower, seconds, upper), (least, ratio, most) = (
            np.percentile(each, [25, 50, 75]).tolist() for each in (values, values / times[base])
        )
        rate = tokens / seconds
        rows[name] = {
            "seconds": seconds,
            "seconds_quartiles": [lower, upper],
            "base": base,
            "ratio": ratio,
            "ratio_quartiles": [least, most],
            "tokens_per_second": rate,
            "flops_per_second": rate * flops[name],
            "peak_fraction": mfu(rate, flops[name], kind, devices),
        }
    return rows


def report(result: dict) -> str:
    """The result for people."""
    lines = [
        f"{result['devices']} x {result['device']}, {result['threads']} threads, JAX {result['jax']}, "
        f"GLIBC_TUNABLES={result['glibc_tunables'] or 'unset'}, {result['rounds']} rounds"
    ]
    for layer in result["layers"]:
        sizes = "embed {embed}, mlp {mlp}, {experts} experts, top {k}, {shared} shared, {dtype}".format_map(layer)
        groups = f"{layer['empty_experts']} empty, the largest {layer['largest_group_over_mean']:.2f} of the mean"
        lines += ["", f"layer, {layer['tokens']} tokens, {sizes}; {layer['routing']} choice: {groups}"]
        rows = [
            (f"{title} {TITLES.get(name, name)}", row)
            for mode, (title, _) in MODES.items()
            for name, row in layer[mode].items()
        ]
        lines += table(dict(rows), layer["left_out"])
    if step := result["step"]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in step["mesh"].items() if size > 1) or "one device"
        sizes = "{num_layers} layers, embed {d_model}, mlp {mlp_dim}, {num_experts} experts, top {experts_per_token}"
        sizes += ", {shared_experts} shared, {dtype}"
        lines += ["", f"training step, {step['tokens']} tokens, {sizes.format_map(step['model'])}; mesh: {mesh}"]
        lines += table({TITLES.get(name, name): row for name, row in step["train_step"].items()}, step["left_out"])
    return "\n".join(lines)


def columns(title: str, row: dict) -> dict[str, str]:
    """A row for people, by the headings of its columns."""
    lower, upper = (1e3 * value for value in row["seconds_quartiles"])
    cells = {
        "": title,
        "ms (quartiles)": f"{show(1e3 * row['seconds'])} ({show(lower)}-{show(upper)})",
        f"/ {row['base']}": "{:.3g} ({:.3g}-{:.3g})".format(row["ratio"], *row["ratio_quartiles"]),
        "tokens/s": show(row["tokens_per_second"]),
        "GFLOP/s": show(row["flops_per_second"] / 1e9),
        "of peak": "unknown" if row["peak_fraction"] is None else f"{row['peak_fraction']:.3f}",
        "temporaries MB": show(row["temporaries_mb"]),
    }
    if "off_by" not in row:
        more = {"arguments MB": row["arguments_mb"], "compile s": row["compile_seconds"]}
        more["parameters, M"] = row["parameters"] / 1e6
        return cells | {heading: show(value) for heading, value in more.items()}
    off = {part: f"{value:.1e}" for part, value in row["off_by"].items()}
    gradients = "  ".join(f"{part} {value}" for part, value in off.items() if part != "y")
    return cells | {"result off by": off.get("y", ""), "gradients off by": gradients}


def table(rows: dict[str, dict], left_out: dict[str, str]) -> list[str]:
    """Lines of one table, and of what it lacks."""
    every = [columns(title, row) for title, row in rows.items()]
    lines = [*map(list, every[:1]), *(list(cells.values()) for cells in every)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"  {first:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in lines
    ]
    return text + [f"  left out: {name}: {reason}" for name, reason in left_out.items()]


def run(config: RunConfig | None, options: argparse.Namespace) -> dict:
    """Everything that the command line asks for; `config` None: no training step."""
    step = config and step_result(config, options.rounds)  # first: a wrong key ends it before the layers' minutes
    routings = (False, True) if options.skew else (False,)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "threads": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "rounds": options.rounds,
        "layers": [layer_result(shape, skew, options) for shape in options.shapes for skew in routings],
        "step": step,
    }


def read(words: list[str]) -> tuple[RunConfig | None, argparse.Namespace]:
    """The configuration of the training step, None where it is not measured, and the options.

    Raises:
      UserError: what cannot be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options, rest = parser.parse_known_args(words)
    config = parse(rest, default=DEFAULT)
    if options.layer_only and rest:
        raise UserError(f"{rest[0]}: with --layer-only no configuration is measured; leave it out")
    platform = jax.default_backend()
    if options.dispatches is None:
        options.dispatches = ["dense", "blocked", *{"gpu": ["ragged"], "tpu": ["ragged", "gmm"]}.get(platform, [])]
    resolved = [resolve_dispatch(name, platform=platform, dtype=options.dtype) for name in options.dispatches]
    options.dispatches = list(dict.fromkeys(resolved))
    options.shapes = [Shape(*sizes) for sizes in options.shape] + [OLMOE] * options.olmoe
    options.shapes = [] if options.step_only else options.shapes or [SMALL]
    for shape in options.shapes:
        check(shape.k <= shape.experts, "--shape", " ".join(map(str, shape)), "more experts per token than experts")
    check(options.shared >= 0, "--shared", options.shared, "must not be negative")
    return None if options.layer_only else config, options


def main(words: list[str]) -> None:
    """Measure what the command line asks for and print it."""
    result = run(*(arguments := read(words)))
    print(json.dumps(result) if arguments[1].json else report(result))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
