"""A pretraining run from configuration to final evaluation."""

import contextlib
import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import to_yaml
from hybridnorm_jax.data import Data, open_data, train_iterator
from hybridnorm_jax.errors import ConfigError, RunStopped
from hybridnorm_jax.evaluation import perplexity
from hybridnorm_jax.generation.sampling import generate
from hybridnorm_jax.mesh.checks import check_batch
from hybridnorm_jax.training.anomalies import no_anomalies
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.goodput import TimeLedger
from hybridnorm_jax.training.metrics import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import open_run_directory
from hybridnorm_jax.training.start_report import start_report
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.step_log import StepLog
from hybridnorm_jax.training.stopping import StopSignals
from hybridnorm_jax.training.watch import Measures
from hybridnorm_jax.training.watchdog import Watchdog

# The first step compiles, which would drown the others in a trace.
PROFILE_AFTER, PROFILED_STEPS = 1, 5
# Number, metrics and what was watched, on the device.
Step = tuple[int, dict[str, jax.Array], Measures | None]


def train(config: RunConfig, *, began: float | None = None) -> dict[str, perplexity.Score]:
    """Train, or go on training, the run that `config` describes; returns the final scores of its validation sets.

    Args:
      began: time.perf_counter() when the process began, for its goodput; None: now.

    Raises:
      UserError: anything the caller can mend, in one line; what was saved before stays as it is.
      RunStopped: by SIGTERM, SIGINT or a preemption notice; every step that was made is saved.
    """
    ledger = TimeLedger(began)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        with signals.interruptible():
            program, data = _prepare(config)
            # JAX's coordination service, which starts with the devices, has a handler of its own for SIGTERM.
            signals.install()
        directory = open_run_directory(config)
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep))
        step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
        writer = stack.enter_context(contextlib.closing(_metrics_writer(config, directory, step)))
        state, iterator, first = _start(config, program, data, checkpoints, step)
        _say(start_report(config, program, data, directory, resumed=first))
        loop = _Loop(config, program, data, directory, checkpoints, writer, signals, ledger)
        try:
            state, scores = loop.run(state, iterator, first)
        finally:
            _say("\n" + ledger.table())
    results = (
        perplexity.table(scores) if scores else "no validation set: data.validation_fraction=0, data.validation={}"
    )
    _say(f"\nEvaluation at step {config.train.steps}\n{results}")
    if config.train.sample_tokens:
        _say(_sample(config, data, state.params))
    return scores


def _prepare(config: RunConfig) -> tuple[Program, Data]:
    """What needs no run directory: the program, checked, and the data, tokenized where they are not yet."""
    program = Program(config)
    check_batch("train.batch_size / train.grad_accumulation", config.microbatch_size, program.mesh, program.rules)
    data = open_data(
        config.data,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        progress=jax.process_index() == 0,
    )
    return program, data


def _start(
    config: RunConfig, program: Program, data: Data, checkpoints: Checkpoints, step: int | None
) -> tuple[TrainState, Any, int]:
    """State, data iterator and number of updates made: from the checkpoint of `step`, from init_from, or fresh."""
    iterator = train_iterator(
        data.train,
        batch_size=config.train.batch_size,
        accumulation=config.train.grad_accumulation,
        seed=config.train.seed if config.train.data_seed is None else config.train.data_seed,
        share=program.share,
        read_threads=config.data.read_threads,
    )
    if step is not None:
        state, data_state = _restore(program, checkpoints, step)
        if data_state["train_tokens"] != data.train.num_tokens:
            before, now = data_state["train_tokens"], data.train.num_tokens
            right = "restore the data as it was, or start a new run with init_from"
            raise ConfigError(f"data: {now:,} tokens to train on, but {before:,} when step {step} was saved; {right}")
        iterator.set_state(data_state["iterator"])
        return state, iterator, step
    if config.init_from is None:
        return program.fresh_state(), iterator, 0
    source, step = find_checkpoint(config.init_from)
    with Checkpoints(source, keep=1) as other:
        if step is None:
            step = other.usable(allow_fallback=config.checkpoint.allow_fallback)
        params = other.restore_params(program.abstract_state.params, step)
    return dataclasses.replace(program.fresh_state(), params=params), iterator, 0


def _metrics_writer(config: RunConfig, directory: epath.Path, resume_step: int | None) -> MetricsWriter:
    return MetricsWriter(
        directory,
        resume_step=resume_step,
        wandb=config.run.wandb,
        wandb_project=config.run.wandb_project,
        run_name=config.run.name,
        config=dataclasses.asdict(config),
        enabled=jax.process_index() == 0,
    )


def _say(text: str) -> None:
    """Print on one process of all."""
    if jax.process_index() == 0:
        print(text, flush=True)


class _Loop:
    """The steps between start and end: metrics read one step late, evaluations and checkpoints on the way."""

    def __init__(
        self,
        config: RunConfig,
        program: Program,
        data: Data,
        directory: epath.Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        signals: StopSignals,
        ledger: TimeLedger,
    ):
        self.config, self.program, self.data, self.directory = config, program, data, directory
        self.checkpoints, self.writer, self.signals, self.ledger = checkpoints, writer, signals, ledger
        self.config_yaml = to_yaml(config)
        self.log = StepLog(config, program, directory, writer, ledger, checkpoints)
        self.profiling = False
        self.evaluation_compiled = self.watch_compiled = False

    def run(self, state: TrainState, iterator: Any, first: int) -> tuple[TrainState, dict[str, perplexity.Score]]:
        """Train from step `first` to the last, then save and evaluate."""
        self.state, self.iterator, self.first, self.step = state, iterator, first, first
        self.late: Step | None = None  # the step that the device may still be busy with
        scores, steps, train = None, self.config.train.steps, self.config.train
        # A log file is no terminal: there the bar is a line every half minute.
        look = {"mininterval": 0.2 if sys.stderr.isatty() else 30, "disable": jax.process_index() != 0}
        watchdog = Watchdog(
            *(self.ledger, train.stall_seconds, self.directory),
            where=lambda: f"after step {self.step}",
            end=train.stall_exit,
        )
        bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, **look)
        with watchdog, bar as self.bar:
            try:
                if self._owes_evaluation():
                    scores = self._evaluate()
                while self.step < steps:
                    scores = self._next_step()
                if scores is None:  # the run had ended before
                    scores = self._score()
            except RunStopped as stopped:
                raise RunStopped(stopped.exit_code, self._save_stopped()) from None
        self.ledger.enter("other")
        return self.state, scores

    def _next_step(self) -> dict[str, perplexity.Score] | None:
        """One step and what is due after it; the scores where that was an evaluation."""
        config, step = self.config, self.step + 1
        if config.train.profile and step - self.first == PROFILE_AFTER + 1:
            self._start_profile()
        self.checkpoints.raise_if_failed()
        self.signals.poll()
        batch = self._next_batch()
        watched = self._watch(step, batch)
        with self.ledger.phase("compilation" if self.step == self.first else "steps"):
            self.state, metrics = self.program.train_step(self.state, batch)
        self.step = step
        # The device is busy with this step while the one before is read.
        previous, self.late = self.late, (step, metrics, watched)
        self._record(previous)
        last = step == config.train.steps
        if config.train.profile and (step - self.first == PROFILE_AFTER + PROFILED_STEPS or last):
            self._stop_profile()
        saves = step % config.checkpoint.every == 0 or last
        evaluates = step % config.eval.every == 0 or last
        if saves or evaluates:
            self._record_late()
        if saves:
            self._save(wait=last)
        return self._evaluate() if evaluates else None

    def _next_batch(self) -> Any:
        """The next batch. Waiting for it is a step's time if the device was busy all the while."""
        self.ledger.enter("input")
        batch = next(self.iterator)
        waited = self.ledger.enter("steps")
        if self.late is not None and not self.late[1]["loss"].is_ready():
            self.ledger.move(waited, "input", "steps")
        return batch

    def _record_late(self) -> None:
        late, self.late = self.late, None
        self._record(late)

    def _record(self, item: Step | None) -> None:
        if item is not None:
            self.log.record(*item, self.bar)

    def _watch(self, step: int, batch: Any) -> Measures | None:
        """Measures of every layer in the first step and every train.watch_every-th."""
        every = self.config.train.watch_every
        if every is None or (step > 1 and step % every):
            return None
        with self.ledger.phase("steps" if self.watch_compiled else "compilation"):
            watched = self.program.watch(self.state, batch)
        if not self.watch_compiled:
            self.log.clock.pause()
        self.watch_compiled = True
        return watched

    def _save(self, *, wait: bool) -> None:
        self.log.before_save(self.step)
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(
                self.step,
                self.state,
                data_state={"iterator": self.iterator.get_state(), "train_tokens": self.data.train.num_tokens},
                config_yaml=self.config_yaml,
                wait=wait,
            )
        self.log.clock.pause()

    def _save_stopped(self) -> str:
        """Save a run that is told to stop, unless this step is saved already; what became of it, in words."""
        self._stop_profile()
        self._record_late()
        if self.step == self.first:
            return "no step was made, nothing was to be saved"
        self._save(wait=True)
        return f"step {self.step} is saved"

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped after the step it begins with, and before that step's evaluation was recorded."""
        config, step = self.config, self.step
        due = step > 0 and (step % config.eval.every == 0 or step == config.train.steps)
        if not due or not self.data.validation:
            return False
        owes = jax.process_index() == 0 and not _is_evaluated(self.directory / "metrics.jsonl", step)
        return owes if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(owes)))

    def _evaluate(self) -> dict[str, perplexity.Score]:
        """Score and record."""
        step, scores = self.step, self._score()
        losses = {f"eval/{name}/loss": score.loss for name, score in scores.items()}
        if losses:
            self.writer.write(step, losses)
        if losses and step != self.config.train.steps and jax.process_index() == 0:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        return scores

    def _score(self) -> dict[str, perplexity.Score]:
        with self.ledger.phase("evaluation"):
            scores = perplexity.evaluate_sets(
                self._eval_step,
                self.data.validation,
                batch_size=self.program.eval_batch_size,
                share=self.program.share,
                batches=self.config.eval.batches,
                progress=jax.process_index() == 0,
            )
        self.log.clock.pause()
        return scores

    def _eval_step(self, batch: Any) -> Any:
        self.signals.poll()
        # Entered anew for every batch: that is what the watchdog takes for a sign of life.
        self.ledger.enter("evaluation")
        with self.ledger.phase("evaluation" if self.evaluation_compiled else "compilation"):
            sums = self.program.eval_step(self.state.params, batch)
        self.evaluation_compiled = True
        return sums

    def _start_profile(self) -> None:
        jax.profiler.start_trace(str(self.directory / "profile"))
        self.profiling = True

    def _stop_profile(self) -> None:
        if self.profiling:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.profiling = False


def _restore(program: Program, checkpoints: Checkpoints, step: int) -> tuple[TrainState, dict]:
    """(state, data state); where a version that skipped no steps saved them, none has been skipped."""
    abstract = program.abstract_state
    if "anomalies" in checkpoints.fields(step):
        return checkpoints.restore(abstract, step)
    state, data_state = checkpoints.restore(dataclasses.replace(abstract, anomalies=None), step)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.anomalies)
    fresh = jax.jit(no_anomalies, static_argnums=0, out_shardings=places)(program.config.train.spike_window)
    return dataclasses.replace(state, anomalies=fresh), data_state


def _is_evaluated(file: epath.Path, step: int) -> bool:
    """Whether metrics.jsonl, which MetricsWriter has mended, holds an evaluation of this step."""
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return any(record["step"] == step and any(key.startswith("eval/") for key in record) for record in records)


def _sample(config: RunConfig, data: Data, params: Any) -> str:
    """A sample of text from the trained model, with a heading."""
    tokenizer = data.tokenizer
    if tokenizer is None:
        return "\nNo sample of text: data.tokenizer names no tokenizer for these token files."
    prompt = [tokenizer.separator_id] if tokenizer.separator_id is not None else [0]
    key = jax.random.key(config.train.seed)
    count = config.train.sample_tokens
    ids = generate(config.model, params, np.asarray(prompt), num_tokens=count, window=config.train.seq_len, key=key)
    return f"\nA sample of {count} tokens:\n{tokenizer.decode(ids)}"
