"""A process that imports the program once, and is copied for each case: a case costs milliseconds.

    python -m tests.malformed.zygote

reads a case a line, {"cwd": ..., "arguments": [...], "devices": ..., "seconds": ...}, and answers in a line,
{"status": ..., "error": ..., "seconds": ..., "peak": ...}.

A copy that would lower a program for the devices ends with the status ACCEPTED instead: refusals come before, and the
threads of the devices do not live on in a copy.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback

from tests.malformed.case import ACCEPTED

# A limit on addresses, not on memory: enough above what JAX itself reserves, and so little that no case can swap.
ADDRESSES = 6 * 2**30


def main() -> None:
    """Import, and serve cases until standard input ends; a copy with devices serves those that may have them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import()
    to_warm, to_cold = os.pipe(), os.pipe()
    warm = os.fork()
    if warm == 0:
        os.close(to_warm[1])
        _trace_one()
        _serve(os.fdopen(to_warm[0]), os.fdopen(to_cold[1], "w"))
        os._exit(0)
    os.close(to_warm[0])
    with os.fdopen(to_warm[1], "w") as questions, os.fdopen(to_cold[0]) as replies:

        def ask(line: str) -> str:
            print(line, end="", file=questions, flush=True)
            return replies.readline()

        _serve(sys.stdin, answers, warm=ask)
    os.waitpid(warm, 0)


def _serve(questions, answers, warm=None) -> None:
    base = _run([], cwd=".", seconds=60)["peak"]
    for line in questions:
        asked = json.loads(line)
        if asked["devices"] and warm is not None:
            answer = warm(line)
        else:
            outcome = _run(asked["arguments"], cwd=asked["cwd"], seconds=asked["seconds"])
            outcome["peak"] = max(outcome["peak"] - base, 0)
            answer = json.dumps(outcome) + "\n"
        print(answer, end="", file=answers, flush=True)


def _import() -> None:
    import importlib

    from hybridnorm_jax.commands.main import COMMANDS

    modules = [f"commands.{name}" for name in COMMANDS] + ["lab.compare", "planning.compilation"]
    modules += ["training.loop", "training.dry_run", "equivalence.proof", "interop.huggingface"]
    for module in modules:
        importlib.import_module(f"hybridnorm_jax.{module}")


def _trace_one() -> None:
    import warnings

    from hybridnorm_jax.config.arguments import parse
    from hybridnorm_jax.training.program import Program

    # The copies use none of the threads that JAX warns of.
    warnings.filterwarnings("ignore", message="os.fork")
    Program(parse(["model.d_model=8", "model.num_heads=1", "model.num_layers=1", "train.batch_size=1"]))


def _run(arguments: list[str], *, cwd: str, seconds: float) -> dict:
    """How `hybridnorm ARGUMENTS` ends in a copy of this process."""
    error = os.memfd_create("error")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_program(arguments, cwd, error)
    waiting = os.pidfd_open(child)
    if not select.select([waiting], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    os.close(waiting)
    text = os.pread(error, 100_000, 0).decode(errors="replace")
    os.close(error)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "error": text,
        "seconds": time.monotonic() - began,
        "peak": usage.ru_maxrss * 1024,
    }


def _be_the_program(arguments: list[str], cwd: str, error: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.dup2(error, 2)
        os.chdir(cwd)
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, held + ADDRESSES))
        _end_where_it_computes()
        from hybridnorm_jax.commands.main import main as program

        status = program(arguments)
    except SystemExit as end:  # as Python would end
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _end_where_it_computes() -> None:
    from jax._src.interpreters import mlir

    mlir.lower_jaxpr_to_module = lambda *_, **__: os._exit(ACCEPTED)


if __name__ == "__main__":
    main()
