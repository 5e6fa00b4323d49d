"""`hybridnorm eval`: score a run on its validation sets."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.run_config import DataSection, RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml, gather, named_plugins
from hybridnorm_jax.data import Data, DataError, open_data
from hybridnorm_jax.data.sources import find_files
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.held_out import check_same_data, check_sets, check_share, training_files
from hybridnorm_jax.evaluation.perplexity import Score, evaluate_sets, table
from hybridnorm_jax.mesh.cluster import DistributedSection
from hybridnorm_jax.mesh.processes import Processes, say
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import saved_config
from hybridnorm_jax.training.step_directories import find_checkpoint
from hybridnorm_jax.training.trained_before import (
    Trained,
    check_named_sets,
    check_tokenizer,
    check_validation,
    is_kept_out,
    trained_before,
    trained_on,
    training_data,
)

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
    "train.watch_every=null",
)
# Model keys that may be another in evaluation than in training: the function stays the same up to rounding.
SAME_FUNCTION = ("model.dtype", "model.dropout", "model.initializer", "model.init_std")


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The scores of every validation set, which checkpoint they are of, and what is said where a part was scored."""

    checkpoint: str
    step: int
    scores: Mapping[str, Score]
    part: str = ""


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
            step = checkpoints.needed(allow_fallback=_allows_fallback(overrides))
        text = checkpoints.read_config(step)
        saved = saved_config(checkpoints, step, import_these=named_plugins(overrides))
        config = from_yaml(text, [*ANYWHERE, *overrides])
        data_state = checkpoints.read_data_state(step)
        known = trained_on(data_state, saved.data)
        own = ("model.",) if known else ("model.", "data.tokenizer")
        for line in differences(saved, config):
            if line.startswith(own) and not line.startswith(SAME_FUNCTION):
                raise ConfigError(f"{line}: {directory.parent} holds that model and no other")
        program = Program(config)
        data = _open_data(saved, config, data_state, where=str(directory.parent), progress=progress)
        params = checkpoints.restore_params(program.abstract_state.params, step)
    scores = evaluate_sets(
        lambda batch: program.eval_step(params, batch),
        data.validation,
        batch_size=program.eval_batch_size,
        share=program.share,
        sequences=program.eval_sequences,
        progress=progress,
    )
    limit = program.eval_sequences
    part = "" if limit is None else f"; at most the first {limit:,} sequences of each set"
    return RunScores(str(directory / f"{step:06d}"), step, scores, part)


def _open_data(
    saved: RunConfig, config: RunConfig, data_state: Mapping[str, Any], *, where: str, progress: bool
) -> Data:
    """The data of this evaluation, if nothing in it is called validation that the run trained on.

    Raises:
      UserError: something is, the tokenizer is another one, nothing can be scored, or something cannot be read.
    """
    check_share(saved.data, config.data)
    data = open_data(config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size, progress=progress)
    if not data.validation:
        raise ConfigError("data.validation={}: the run held nothing out; name a set, data.validation.NAME=[FILE]")
    known, now = trained_on(data_state, saved.data), training_data(config.data, data)
    check_tokenizer(known, config.data, now, where=where)
    is_same = _is_same_data(data_state, known, now, data.train.num_tokens)
    check_same_data(config.data, differences(saved, config), is_same_data=is_same)
    if config.data.validation_fraction and ("train_tokens" in data_state or known) and not is_same:
        _judge_other_data(data_state, known, now, data.train.num_tokens)
    if config.data.validation:
        check_sets(config.data.validation, _files_here(saved.data, config.data, is_same_data=is_same))
        check_named_sets(known, config.data, where=where)
    check_validation(trained_before(data_state), config.data, now, where=where)
    return data


def _is_same_data(data_state: Mapping[str, Any], known: Sequence[Trained], now: Trained, tokens: int) -> bool:
    """Whether the data are those that were saved: by their files, of which an old version kept the tokens alone.

    A run that was converted has a checkpoint without data; the last that is known of are those of its original.

    Args:
      known, now: what was trained on, and what would be now.
      tokens: how many would be trained on now.
    """
    if "train_tokens" not in data_state:
        return bool(known) and known[-1].files == now.files
    return data_state["train_tokens"] == tokens and data_state.get("files") in (None, now.files)


def _judge_other_data(data_state: Mapping[str, Any], known: Sequence[Trained], now: Trained, tokens: int) -> None:
    """Of a run whose data were changed under the same name: say what that means, or refuse.

    Args:
      known, now, tokens: as for _is_same_data.

    Raises:
      ConfigError: what is held out now may have been trained on (trained_before.is_kept_out).
    """
    before = data_state.get("train_tokens")
    if before is None:
        changed = "other files than its parameters were trained on"
    elif before == tokens:
        changed = "other files than when the checkpoint was saved, with as many tokens"
    else:
        changed = f"{tokens:,} tokens to train on, but {before:,} when the checkpoint was saved"
    if not known or not is_kept_out(known[-1], now):
        right = "restore them, or set data.validation_fraction=0 and name sets in data.validation"
        raise ConfigError(f"data.files: {changed}: what is held out now may have been trained on; {right}")
    say(f"note: data: {changed}: the held-out documents are not those of training", file=sys.stderr)


def _files_here(saved: DataSection, asked: DataSection, *, is_same_data: bool) -> Sequence[epath.Path]:
    """The files that the run trained on, as far as they are here."""
    if is_same_data:
        return training_files(asked)
    found: list[epath.Path] = []
    for pattern in saved.files:
        with contextlib.suppress(DataError):  # it is not here, so no set can name it
            found += find_files("data.files", [pattern])
    return found


def _allows_fallback(overrides: Sequence[str]) -> bool:
    """What is asked here; whether the run itself was allowed to is its own affair."""
    asked = [override for override in overrides if override.startswith("checkpoint.")]
    return from_yaml("{}", asked).checkpoint.allow_fallback


USAGE = """usage: hybridnorm eval RUN_DIR [key=value ...] [--json]

Prints the loss (nats per token), the perplexity and the bits per byte of every
validation set of a run, from its newest checkpoint. RUN_DIR/checkpoints/STEP
names another checkpoint.

Keys are those of `hybridnorm train`; `hybridnorm train --help` lists them. The
model, the tokenizer and the share of the training data that was held out are
the run's and cannot be changed. Often used:

  'data.validation.c4=[c4/*.npy]'
      score other files too, as a set with the name c4; files that the run
      trained on are refused
  eval.batches=8
      score only the beginning of each set: this many batches of eval.batch_size
      sequences
  mesh.fsdp=1 mesh.tensor=8
      place the model on the devices; default: all on mesh.fsdp
  distributed.coordinator=HOST:PORT
      run several processes where no cluster is found

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
        sets = {name: score.as_json() for name, score in result.scores.items()}
        print(json.dumps({"checkpoint": result.checkpoint, "step": result.step, "sets": sets}, indent=2))
    else:
        print(f"{result.checkpoint}: loss in nats per token{result.part}\n{table(result.scores)}")


def _distributed(overrides: Sequence[str]) -> DistributedSection:
    """What is asked here: the run's configuration, which says nothing of these processes, is read when they are up."""
    settings = gather([], overrides)
    return DistributedSection(
        **{path.partition(".")[2]: value for path, value in settings.items() if path.startswith("distributed.")}
    )
