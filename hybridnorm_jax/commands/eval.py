"""`hybridnorm eval`: score a run on its validation sets."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.commands import eval_tasks
from hybridnorm_jax.commands.program import ArgumentParser, wants_help
from hybridnorm_jax.commands.program_cache import keep_programs
from hybridnorm_jax.commands.scored_run import open_run
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.commands.which_parameters import WhichParameters, add_option
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import gather
from hybridnorm_jax.data import Data, DataError, open_data
from hybridnorm_jax.data.dataset import source_key
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.mixture import mixture_of
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.held_out import check_same_data, check_sets, check_share, training_files
from hybridnorm_jax.evaluation.perplexity import Score, evaluate_sets, table
from hybridnorm_jax.mesh.cluster import DistributedSection
from hybridnorm_jax.mesh.processes import Processes, say
from hybridnorm_jax.training.trained_before import (
    Trained,
    check_named_sets,
    check_tokenizer,
    check_validation,
    is_all_kept_out,
    trained_before,
    trained_on,
    training_data,
)
from hybridnorm_jax.training.trained_sources import files_of


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The scores of every validation set, what they are of, and what is said where a part was scored."""

    checkpoint: str
    step: int
    which: WhichParameters
    scores: Mapping[str, Score]
    part: str = ""


def evaluate_run(path: str, overrides: Sequence[str] = (), *, progress: bool = True, plain: bool = False) -> RunScores:
    """Score a run's newest checkpoint, or the one that `path` names, on whatever devices there are.

    Args:
      path: a run's directory, or one checkpoint's such as runs/quickstart/checkpoints/000500.
      overrides: key=value, on the configuration saved with the checkpoint; with checkpoint.allow_fallback=true the
        checkpoint before a damaged newest one is scored, never one before the one that `path` names.
      plain: of a run that averages its parameters score those of the last step.

    Raises:
      UserError: no checkpoint there, or an override that makes another model of it.
    """
    run = open_run(path, overrides, plain=plain)
    program = run.program
    data = _open_data(run.saved, run.config, run.data_state, where=run.where, progress=progress)
    params, which = run.params(), run.which()
    mixture = mixture_of(run.config, data)
    scores = evaluate_sets(
        lambda batch: program.eval_step(params, batch),
        data.validation,
        batch_size=program.eval_batch_size,
        share=program.share,
        sequences=program.eval_sequences,
        stride=program.config.eval.stride,
        mixed=mixture.shares_of_sets if mixture else None,
        progress=progress,
    )
    limit = program.eval_sequences
    part = "" if limit is None else f"; at most the first {limit:,} sequences of each set"
    return RunScores(run.name, run.step, which, scores, part)


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
    is_same = _is_same_data(data_state, known, now, files_of(config.data, data), data.train_tokens)
    check_same_data(config.data, differences(saved, config), is_same_data=is_same)
    if config.data.validation_fraction and ("train_tokens" in data_state or known) and not is_same:
        _judge_other_data(data_state, known, now, data.train_tokens)
    if config.data.validation:
        check_sets(config.data.validation, _files_here(saved.data, config.data, is_same_data=is_same))
        check_named_sets(known, config.data, where=where)
    check_validation(trained_before(data_state), config.data, now, where=where)
    return data


def _is_same_data(
    data_state: Mapping[str, Any],
    known: Sequence[Trained],
    now: Sequence[Trained],
    files: list[dict[str, Any]],
    tokens: int,
) -> bool:
    """Whether the data are those that were saved: by their files, of which an old version kept the tokens alone.

    A run that was converted has a checkpoint without data; the last that is known of are those of its original.

    Args:
      known, now: what was trained on, and what would be now.
      files, tokens: which files, and how many tokens, would be trained on now.
    """
    if "train_tokens" not in data_state:
        return bool(known) and [one.files for one in known[-len(now) :]] == [one.files for one in now]
    return data_state["train_tokens"] == tokens and data_state.get("files") in (None, files)


def _judge_other_data(
    data_state: Mapping[str, Any], known: Sequence[Trained], now: Sequence[Trained], tokens: int
) -> None:
    """Of a run whose data were changed under the same name: say what that means, or refuse.

    Args:
      known, now, tokens: as for _is_same_data.

    Raises:
      ConfigError: what is held out now may have been trained on (trained_before.is_all_kept_out).
    """
    before = data_state.get("train_tokens")
    if before is None:
        changed = "other files than its parameters were trained on"
    elif before == tokens:
        changed = "other files than when the checkpoint was saved, with as many tokens"
    else:
        changed = f"{tokens:,} tokens to train on, but {before:,} when the checkpoint was saved"
    if not known or not is_all_kept_out(known, now):
        right = "restore them, or set data.validation_fraction=0 and name sets in data.validation"
        raise ConfigError(f"data.files: {changed}: what is held out now may have been trained on; {right}")
    say(f"note: data: {changed}: the held-out documents are not those of training", file=sys.stderr)


def _files_here(saved: DataSection, asked: DataSection, *, is_same_data: bool) -> Sequence[Place]:
    """The files that the run trained on, as far as they are here."""
    if is_same_data:
        return training_files(asked)
    found: list[Place] = []
    for name, section in saved.sources.items():
        for pattern in section.files:
            with contextlib.suppress(DataError):  # it is not here, so no set can name it
                found += find_files(source_key(name), [pattern])
    return found


# Keys of training for which this command has options: a saved run's tasks are not run, because it may be a stranger's.
OF_TRAINING = {"eval.tasks": "--tasks", "eval.task_limit": "--limit", "eval.plain": "--plain"}

USAGE = """usage: hybridnorm eval RUN_DIR [key=value ...] [--plain] [--json]
       hybridnorm eval RUN_DIR --tasks TASK[,TASK ...] [--limit N]
                               [key=value ...] [--plain] [--json]

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

--tasks scores tasks of the LM Evaluation Harness instead, and needs the extra
eval. A TASK is one of

  hellaswag, arc_easy, ...  a task, group or tag of the harness, which downloads
                            its data
  hybridnorm                eight tasks of the HybridNorm paper and their mean
  FOLDER or FILE.yaml       your own, in the harness's format; functions that
                            they name are run

--limit N scores the first N documents of each task.
--plain scores the parameters of the last step, of a run that averages its
parameters (optimizer.ema_decay); otherwise the averaged ones are scored.
--json prints one JSON object and nothing else on standard output."""


def run(arguments: Sequence[str], processes: Processes) -> None:
    """`hybridnorm eval RUN_DIR [key=value ...] [--tasks TASKS] [--limit N] [--plain] [--json]`."""
    check_syntax("eval", arguments)
    if wants_help(arguments):
        print(USAGE)
        return
    options = _parser().parse_intermixed_args(list(arguments))
    settings = options.settings
    # The name of a run may hold `=`.
    if not settings or ("=" in Path(settings[0]).name and not Path(settings[0]).exists()):
        raise ConfigError("eval: name the run directory first, such as runs/quickstart; --help says more")
    directory, overrides = settings[0], settings[1:]
    for argument in overrides:
        if "=" not in argument:
            raise ConfigError(f"{argument}: eval takes one run directory, and then key=value only")
        if argument.partition("=")[0] in OF_TRAINING:
            raise ConfigError(f"{argument}: a key of training; here it is {OF_TRAINING[argument.partition('=')[0]]}")
    asked = eval_tasks.asked_tasks(options.tasks, options.limit)
    with processes.running(_distributed(overrides)):
        keep_programs(speaks=processes.number == 0)
        if asked is not None:
            text = eval_tasks.scores_of_run(directory, overrides, asked, as_json=options.json, plain=options.plain)
        else:
            progress = processes.number == 0 and not options.json
            result = evaluate_run(directory, overrides, progress=progress, plain=options.plain)
            text = _as_json(result) if options.json else _as_text(result)
    if processes.number == 0:
        print(text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm eval", usage="", description="")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", action="store_true")
    add_option(parser)
    return parser


def _as_text(result: RunScores) -> str:
    """What is printed of the validation sets."""
    of = f"{result.checkpoint}{result.which.said}"
    return f"{of}: loss in nats per token{result.part}\n{table(result.scores)}"


def _as_json(result: RunScores) -> str:
    """The same for programs."""
    of = {"checkpoint": result.checkpoint, "step": result.step, "parameters": result.which.name}
    return json.dumps(of | {"sets": {name: score.as_json() for name, score in result.scores.items()}}, indent=2)


def _distributed(overrides: Sequence[str]) -> DistributedSection:
    """What is asked here: the run's configuration, which says nothing of these processes, is read when they are up."""
    settings = gather([], overrides)
    return DistributedSection(
        **{path.partition(".")[2]: value for path, value in settings.items() if path.startswith("distributed.")}
    )
