"""`hybridnorm train`: pretrain a model, or go on with a run."""

import operator
import shlex
from collections.abc import Sequence

from hybridnorm_jax.commands.program import again, wants_help
from hybridnorm_jax.commands.syntax import HELP, check_syntax
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_help import key_table
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.plugins import as_arguments
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.mesh.processes import Processes, check_alike
from hybridnorm_jax.streams import sturdy_streams

DRY_RUN = "--dry-run"
USAGE = """usage: hybridnorm train [CONFIG ...] [FILE ...] [key=value ...] [--dry-run]

CONFIG is the name of a configuration, such as 151m, or the path of a YAML file.
Without one it is quickstart. Several are merged in their order, then the
key=value; later ones win. Values are YAML:

  hybridnorm train train.steps=20 model.scheme=peri
  hybridnorm train 151m 'data.files=[a.npy, b.npy]' optimizer.clip=null

FILE is data to train on: text (.txt, .md, .jsonl, packed or not) or token ids
(.npy, .bin). It sets data.source and data.files:

  hybridnorm train book.txt train.steps=20

The same command again resumes the run from its newest checkpoint.

--dry-run compiles the step for the devices at hand and prints mesh, batches and
memory; nothing is trained.

Exit status:
    0  done
    2  an error that you can mend; one line says which
   75  stopped by SIGTERM and saved: the same command goes on
  129  the same at the end of its terminal
  130  the same by Ctrl-C
   76  stalled (train.stall_exit=true)

{title}
"""
DEFAULTS = """Every key with its default, which holds where CONFIG does not set the key.
`hybridnorm train 151m --help` shows the values of 151m."""


def run(arguments: Sequence[str], processes: Processes) -> None:
    """`hybridnorm train [CONFIG ...] [key=value ...] [--dry-run]`."""
    settings = [argument for argument in arguments if argument not in (DRY_RUN, *HELP)]
    check_syntax("train", arguments)
    if wants_help(arguments):
        print(_help(settings))
        return
    config = parse(settings)
    with sturdy_streams():
        _run(config, settings, processes, dry=DRY_RUN in arguments)


def _run(config: RunConfig, settings: Sequence[str], processes: Processes, *, dry: bool) -> None:
    with processes.running(config.distributed):
        check_alike(_same_in_all_processes(config))
        # Only now: together they take seconds to import.
        if dry:
            from hybridnorm_jax.training.dry_run import dry_run

            dry_run(config)
            return
        from hybridnorm_jax.commands.program_cache import keep_programs
        from hybridnorm_jax.training.loop import train
        from hybridnorm_jax.training.time_ledger import process_began

        keep_programs(speaks=processes.number == 0)
        train(config, began=process_began())
    if processes.number == 0:
        _say_next(settings, config)


def _help(settings: Sequence[str]) -> str:
    title = f"Every key with its value in `hybridnorm train {shlex.join(settings)}`." if settings else DEFAULTS
    usage = USAGE.format(title=title)
    return f"{usage}\n{key_table(settings)}"


def _same_in_all_processes(config: RunConfig) -> dict[str, str]:
    """Every key that must be, with its value as text; a cache may be a host's own."""
    kept = [path for path in FIELDS if not path.startswith("distributed.") and path != "data.cache_dir"]
    return {path: spelled(operator.attrgetter(path)(config)) for path in kept}


def _say_next(arguments: Sequence[str], config: RunConfig) -> None:
    evaluation = again(["eval", f"{config.run.dir}/{config.run.name}", *as_arguments(config.run.plugins)])
    print(f"\nNext:\n  score it again, or on other text\n    {evaluation}")
    if config.init_from is not None:  # whose parameters are those of this scheme
        return
    other = _other_scheme(config)
    trained = again(["train", *_with_scheme(arguments, config, other)])
    print(f"  train the same model with another scheme, {other}\n    {trained}")


def _other_scheme(config: RunConfig) -> str:
    return "pre" if config.model.scheme != "pre" else "hybrid_star"


def _with_scheme(arguments: Sequence[str], config: RunConfig, scheme: str) -> list[str]:
    """The same arguments with another scheme, which has no equivalent form."""
    changed = ("model.scheme=", "run.name=", "train.equivalent_", "train.check_invariants=", "distributed.")
    kept = [argument for argument in arguments if not argument.startswith(changed)]
    # A file may name the run, whose directory another scheme must not share.
    has_name = any(argument.endswith(".yaml") for argument in kept)
    named = [f"run.name={config.run.name}-{scheme}"] if has_name else []
    return [*kept, f"model.scheme={scheme}", *named]
