"""`train.py --dry-run`: everything up to the first step, for the devices at hand, and nothing left behind."""

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.mesh.batch_shares import batch_parts
from hybridnorm_jax.training.memory import Memory, bytes_per_device, elements_per_device
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.remat_choice import compiled_program, least_room
from hybridnorm_jax.training.run_directory import run_directory
from hybridnorm_jax.training.start_report import count_text, run_rows, table


def dry_run(config: RunConfig) -> None:
    """Compile the train step and print the start-up report with batches and memory, on process 0.

    No file is written and no data is read, so what is wrong with the data stays unknown.

    Raises:
      UserError: as in training, up to the first step; or the compiler finds no room for the step, after the report.
    """
    compiled = compiled_program(config, room=least_room())
    program = compiled.program
    directory = run_directory(config)
    source = "not read: " + "; ".join(
        " ".join(part for part in (f"{name}:" if name else "", one.source, ", ".join(one.files)) if part)
        for name, one in config.data.sources.items()
    )
    rows = run_rows(
        config, program, f"{directory}: dry run of {count_text(config.train.steps, 'step')}, nothing is written", source
    )
    rows += _batch_rows(program) + _state_rows(program)
    if compiled.memory is not None:
        rows += memory_rows(compiled.memory, _limit(program))
    if jax.process_index() == 0:
        print(table(rows), flush=True)
    if compiled.refusal is not None:
        right = "raise train.grad_accumulation, model.remat or the mesh axes that split parameters"
        raise UserError(f"the train step does not fit these devices: {compiled.refusal}; {right}")


def memory_rows(memory: Memory, limit: int | None) -> list[tuple[str, str]]:
    """What the compiler says of one device; `limit` is what the device has, None where it does not say."""
    room = "" if limit is None else f" of {_size(limit)}"
    return [
        ("memory", f"per device, as the compiler says: {_size(memory.peak)}{room} at the peak, of"),
        ("", f"{_size(memory.arguments)} of arguments (parameters, optimizer state, batch)"),
        ("", f"{_size(memory.outputs - memory.aliased)} of outputs that replace no argument"),
        ("", f"{_size(memory.temporaries)} of temporaries (activations, gradients)"),
        ("", f"{_size(memory.generated_code)} of code"),
    ]


def _batch_rows(program: Program) -> list[tuple[str, str]]:
    config, (number, count) = program.config, program.share
    accumulation, microbatch = program.microbatches
    times = f"{accumulation} x " if accumulation > 1 else ""
    per_device = microbatch // batch_parts(program.mesh, program.rules)
    alone = "" if count == jax.process_count() else ", the same for processes that split sequences or layers"
    share = f"process {jax.process_index()} reads share {number + 1} of {count}{alone}"
    return [
        ("per process", f"{times}{microbatch // count} sequences; {share}"),
        ("per device", f"{times}{per_device} sequences of {config.train.seq_len}"),
    ]


def _state_rows(program: Program) -> list[tuple[str, str]]:
    state = program.abstract_state
    held = f"{elements_per_device(state.params):,} parameters, {_size(bytes_per_device(state.params))}"
    rows = [("", f"{held}; optimizer state {_size(bytes_per_device(state.opt_state))}")]
    if state.average is not None:
        rows.append(("", f"average of the parameters {_size(bytes_per_device(state.average))}"))
    return rows


def _limit(program: Program) -> int | None:
    device = next(device for device in program.mesh.devices.flat if device.process_index == jax.process_index())
    return (device.memory_stats() or {}).get("bytes_limit")


def _size(number: float) -> str:
    return f"{number / 2**30:.4g} GiB" if number >= 2**30 / 10 else f"{number / 2**20:,.1f} MiB"
