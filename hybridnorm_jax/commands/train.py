"""`hybridnorm train`: pretrain a model, or go on with a run."""

import operator
from collections.abc import Sequence

from hybridnorm_jax.commands.program import again, wants_help
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_help import key_table
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import FIELDS, show
from hybridnorm_jax.mesh.processes import Processes, check_alike

DRY_RUN = "--dry-run"
USAGE = """usage: hybridnorm train [CONFIG ...] [key=value ...] [--dry-run]

CONFIG is the name of a configuration, such as quickstart (the default), or a YAML file. Several are merged in order,
then the overrides; later ones win. Values are YAML:
  train.steps=20 optimizer.clip=null data.files=[a.txt,b.txt] data.validation.c4=[c4.npy]

--dry-run compiles the step for the devices at hand, prints mesh, batches and memory, and ends there.

Status: 0 done; 2 an error, in one line; 75 told to stop (SIGTERM) and saved, run it again; 130 the same by
Ctrl-C; 76 stalled (train.stall_exit). docs/faults.md says more.
"""


def run(arguments: Sequence[str], processes: Processes) -> None:
    """`hybridnorm train [CONFIG ...] [key=value ...] [--dry-run]`."""
    settings = [argument for argument in arguments if argument != DRY_RUN]
    if wants_help(settings):
        print(f"{USAGE}\n{key_table([argument for argument in settings if argument not in ('-h', '--help')])}")
        return
    config = parse(settings)
    with processes.running(config.distributed):
        check_alike(_same_in_all_processes(config))
        # Only now: together they take seconds to import.
        if DRY_RUN in arguments:
            from hybridnorm_jax.training.dry_run import dry_run

            dry_run(config)
            return
        from hybridnorm_jax.training.loop import train
        from hybridnorm_jax.training.time_ledger import process_began

        train(config, began=process_began())
    if processes.number == 0:
        _say_next(settings, config)


def _same_in_all_processes(config: RunConfig) -> dict[str, str]:
    """Every key that must be, with its value as text; a cache may be a host's own."""
    kept = [path for path in FIELDS if not path.startswith("distributed.") and path != "data.cache_dir"]
    return {path: show(operator.attrgetter(path)(config)) for path in kept}


def _say_next(arguments: Sequence[str], config: RunConfig) -> None:
    evaluation = again(["eval", f"{config.run.dir}/{config.run.name}"])
    another = again(["train", *_other_scheme(arguments, config)])
    print(f"\nNext: {evaluation}\n  or another placement: {another}")


def _other_scheme(arguments: Sequence[str], config: RunConfig) -> list[str]:
    """The same arguments with another placement, which has no equivalent form."""
    changed = ("model.scheme=", "run.name=", "train.equivalent_", "train.check_invariants=", "distributed.")
    kept = [argument for argument in arguments if not argument.startswith(changed)]
    other = "pre" if config.model.scheme != "pre" else "hybrid_star"
    return [*kept, f"model.scheme={other}"]
