"""The block of lines a run begins with."""

import math
from collections.abc import Sequence

import jax
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data
from hybridnorm_jax.mesh.shardings import undivided
from hybridnorm_jax.model.placement import runs
from hybridnorm_jax.training.program import Program


def start_report(config: RunConfig, program: Program, data: Data, directory: epath.Path, *, resumed: int) -> str:
    """What will be trained, on what, and where its files go."""
    state = f"resumed at step {resumed} of" if resumed else "new,"
    return table(run_rows(config, program, f"{directory} ({state} {config.train.steps} steps)", data.description))


def table(rows: Sequence[tuple[str, str]]) -> str:
    """(name, text) pairs as lines."""
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def run_rows(config: RunConfig, program: Program, run: str, data: str) -> list[tuple[str, str]]:
    """(name, text) of all that is known before the first step; `run` and `data` are the texts of these two."""
    model, train, mesh = config.model, config.train, program.mesh
    params = program.abstract_state.params
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    asked = "" if model.attention == program.backend else f" ({model.attention})"
    count = len(runs(model.placements))
    parts = "1 run" if count == 1 else f"{count} runs"
    rows = [
        ("run", run),
        ("devices", f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es)"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        ("parameters", f"{total:,} ({model.param_dtype}; computes in {model.dtype})"),
    ]
    if model.num_experts:
        rows.append(("experts", _experts(program, total)))
    rows.append(("scheme", f"{model.scheme}, {model.num_layers} layers in {parts}, {model.norm}"))
    if program.conversion is not None:
        rows.append(("form", _form(program)))
    rows += [
        ("attention", f"{program.backend}{asked}"),
        ("tokens/step", f"{config.tokens_per_step:,} = {train.batch_size} sequences x {train.seq_len}"),
        ("data", data),
    ]
    return rows + [("sharding", line) for line in undivided(params, mesh, program.rules)]


def _experts(program: Program, total: int) -> str:
    """How many there are, what a token passes, and what computes them."""
    model = program.config.model
    params = jax.tree.leaves_with_path(program.abstract_state.params)
    experts = sum(math.prod(leaf.shape) for path, leaf in params if "expert_" in jax.tree_util.keystr(path))
    active = total - experts * (model.num_experts - model.experts_per_token) // model.num_experts
    shared = f" and {model.shared_experts} shared" if model.shared_experts else ""
    asked = "" if model.expert_dispatch == program.dispatch else f" ({model.expert_dispatch})"
    each = f"{model.num_experts}, {model.experts_per_token} per token{shared}, width {model.mlp_dim}"
    return f"{each}; {active:,} parameters active; dispatch {program.dispatch}{asked}"


def _form(program: Program) -> str:
    """What the loss computes instead of the Pre-LN model that the optimizer holds."""
    form, width = program.config.train.equivalent_form, program.model.config.d_model
    return f"{form}, stream {program.config.model.d_model} stored as {width}"
