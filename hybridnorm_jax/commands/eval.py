"""`hybridnorm eval`: score a run on its validation sets."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.yaml_files import from_yaml, gather
from hybridnorm_jax.data import open_data
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.perplexity import Score, evaluate_sets, table
from hybridnorm_jax.mesh.cluster import DistributedSection
from hybridnorm_jax.mesh.processes import Processes
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import saved_config

# Where a run trained says nothing of where it is evaluated: by default on all devices there are.
ANYWHERE = (
    "mesh.data=1",
    "mesh.fsdp=-1",
    "mesh.tensor=1",
    "mesh.expert=1",
    "mesh.context=1",
    "mesh.replica=1",
    "model.attention=auto",
    "model.expert_dispatch=auto",
    "eval.batch_size=null",
)
# Model keys that may be another in evaluation than in training: the function stays the same up to rounding.
SAME_FUNCTION = ("model.dtype", "model.dropout", "model.initializer", "model.init_std")


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The scores of every validation set, and which checkpoint they are of."""

    checkpoint: str
    step: int
    scores: Mapping[str, Score]


def evaluate_run(path: str, overrides: Sequence[str] = (), *, progress: bool = True) -> RunScores:
    """Score a run's newest checkpoint, or the one that `path` names, on whatever devices there are.

    Args:
      path: a run's directory, or one checkpoint's such as runs/quickstart/checkpoints/000500.
      overrides: key=value, on the configuration saved with the checkpoint; with checkpoint.allow_fallback=true the
        checkpoint before a damaged newest one is scored, never one before the one that `path` names.

    Raises:
      UserError: no checkpoint there, or an override that makes another model of it.
    """
    directory, step = find_checkpoint(path)
    with Checkpoints(directory, keep=1) as checkpoints:
        if step is None:
            step = checkpoints.usable(allow_fallback=_allows_fallback(overrides))
        text = checkpoints.read_config(step)
        saved = saved_config(checkpoints, step, import_these=gather([], overrides).get("run.plugins", ()))
        config = from_yaml(text, [*ANYWHERE, *overrides])
        for line in differences(saved, config):
            if line.startswith(("model.", "data.tokenizer")) and not line.startswith(SAME_FUNCTION):
                raise ConfigError(f"{line}: {directory.parent} holds that model and no other")
        program = Program(config)
        data = open_data(
            config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size, progress=progress
        )
        if not data.validation:
            raise ConfigError("data.validation={}: the run held nothing out; name a set, data.validation.NAME=[FILE]")
        params = checkpoints.restore_params(program.abstract_state.params, step)
    scores = evaluate_sets(
        lambda batch: program.eval_step(params, batch),
        data.validation,
        batch_size=program.eval_batch_size,
        share=program.share,
        batches=config.eval.batches,
        progress=progress,
    )
    return RunScores(str(directory / f"{step:06d}"), step, scores)


def _allows_fallback(overrides: Sequence[str]) -> bool:
    """What is asked here; whether the run itself was allowed to is its own affair."""
    asked = [override for override in overrides if override.startswith("checkpoint.")]
    return from_yaml("{}", asked).checkpoint.allow_fallback


USAGE = """usage: hybridnorm eval RUN_DIR [key=value ...] [--json]

Prints loss, perplexity and bits per byte of every validation set of a run, from its newest
checkpoint. RUN_DIR/checkpoints/STEP names another checkpoint.

Keys are those of `hybridnorm train`; `hybridnorm train --help` lists them. The model and the
tokenizer are the run's and cannot be changed. Often used:

  eval.batches=8                      score only this many batches of each set
  'data.validation.c4=[c4/*.npy]'     add a set and name it c4
  mesh.fsdp=1 mesh.tensor=8           place the model on the devices; default: all on mesh.fsdp
  distributed.coordinator=HOST:PORT   run several processes where no cluster is found

--json prints one JSON object and nothing else on standard output."""


def run(arguments: Sequence[str], processes: Processes) -> None:
    """`hybridnorm eval RUN_DIR [key=value ...] [--json]`."""
    check_syntax("eval", arguments)
    if wants_help(arguments):
        print(USAGE)
        return
    as_json = "--json" in arguments
    settings = [argument for argument in arguments if argument != "--json"]
    # The name of a run may hold `=`.
    if not settings or ("=" in Path(settings[0]).name and not Path(settings[0]).exists()):
        raise ConfigError("eval: name the run directory first, such as runs/quickstart; --help says more")
    directory, overrides = settings[0], settings[1:]
    for argument in overrides:
        if "=" not in argument:
            raise ConfigError(f"{argument}: eval takes one run directory, and then key=value only")
    with processes.running(_distributed(overrides)):
        result = evaluate_run(directory, overrides, progress=not as_json and processes.number == 0)
    if processes.number != 0:
        return
    if as_json:
        sets = {name: dataclasses.asdict(score) for name, score in result.scores.items()}
        print(json.dumps({"checkpoint": result.checkpoint, "step": result.step, "sets": sets}, indent=2))
    else:
        print(f"{result.checkpoint}\n\n{table(result.scores)}")


def _distributed(overrides: Sequence[str]) -> DistributedSection:
    """What is asked here: the run's configuration, which says nothing of these processes, is read when they are up."""
    settings = gather([], overrides)
    return DistributedSection(
        **{path.partition(".")[2]: value for path, value in settings.items() if path.startswith("distributed.")}
    )
