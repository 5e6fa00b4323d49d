"""A pretraining run from configuration to final evaluation."""

import contextlib
import dataclasses
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from hybridnorm_jax import config_files
from hybridnorm_jax.config import ConfigError
from hybridnorm_jax.data import Data, open_data, train_iterator
from hybridnorm_jax.evaluation import perplexity
from hybridnorm_jax.evaluation.sampling import generate
from hybridnorm_jax.run_config import RunConfig
from hybridnorm_jax.sharding import check_batch
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.metrics import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.report import start_report
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token

# The first step compiles, which would drown the others in a trace.
PROFILE_AFTER, PROFILED_STEPS = 1, 5


def train(config: RunConfig) -> dict[str, perplexity.Score]:
    """Train, or go on training, the run that `config` describes; returns the final scores of its validation sets.

    Raises:
      UserError: anything the caller can mend, in one line; what was saved before stays as it is.
    """
    program = Program(config)
    check_batch("train.batch_size / train.grad_accumulation", config.microbatch_size, program.mesh, program.rules)
    data = open_data(
        config.data,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        progress=jax.process_index() == 0,
    )
    directory = open_run_directory(config)
    with (
        Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
        writer = stack.enter_context(contextlib.closing(_metrics_writer(config, directory, step)))
        state, iterator, first = _start(config, program, data, checkpoints, step)
        _say(start_report(config, program, data, directory, resumed=first))
        loop = _Loop(config, program, data, directory, checkpoints, writer)
        state, scores = loop.run(state, iterator, first)
    results = (
        perplexity.table(scores) if scores else "no validation set: data.validation_fraction=0, data.validation={}"
    )
    _say(f"\nEvaluation at step {config.train.steps}\n{results}")
    if config.train.sample_tokens:
        _say(_sample(config, data, state.params))
    return scores


def open_run_directory(config: RunConfig) -> epath.Path:
    """The run's directory, made where it is new; one with checkpoints of another configuration is refused.

    Raises:
      ConfigError: names every key that differs and decides the trajectory.
    """
    directory = epath.Path(config.run.dir) / config.run.name
    file = directory / "config.yaml"
    try:
        has_checkpoints = file.exists() and (directory / "checkpoints").exists()
    except ImportError as error:  # what etils needs for gs:// is not there
        raise ConfigError(f"run.dir={config.run.dir}: {str(error).splitlines()[0]}") from error
    if has_checkpoints:
        saved = config_files.from_yaml(file.read_text())
        if differing := config_files.differences(saved, config):
            raise ConfigError(f"{directory} holds another run ({'; '.join(differing)}): choose another run.name")
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / "config.yaml.partial"
        partial.write_text(config_files.to_yaml(config))
        partial.replace(file)
    return directory


def _start(
    config: RunConfig, program: Program, data: Data, checkpoints: Checkpoints, step: int | None
) -> tuple[TrainState, Any, int]:
    """State, data iterator and number of updates made: from the checkpoint of `step`, from init_from, or fresh."""
    number, count = program.share
    iterator = train_iterator(
        data.train,
        batch_size=config.train.batch_size,
        accumulation=config.train.grad_accumulation,
        seed=config.train.seed,
        process_index=number,
        process_count=count,
        read_threads=config.data.read_threads,
    )
    if step is not None:
        state, data_state = checkpoints.restore(program.abstract_state, step)
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
    ):
        self.config, self.program, self.data, self.directory = config, program, data, directory
        self.checkpoints, self.writer = checkpoints, writer
        self.flops_per_token = model_flops_per_token(config.model, config.train.seq_len)
        self.config_yaml = config_files.to_yaml(config)
        self.clock = _Clock()
        self.profiling = False

    def run(self, state: TrainState, iterator: Any, first: int) -> tuple[TrainState, dict[str, perplexity.Score]]:
        """Train from update `first` to the last, then save and evaluate."""
        config, steps = self.config, self.config.train.steps
        scores, late = None, None
        # A log file is no terminal: there the bar is a line every half minute.
        look = {"mininterval": 0.2 if sys.stderr.isatty() else 30, "disable": jax.process_index() != 0}
        with tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, **look) as bar:
            for step in range(first + 1, steps + 1):
                if config.train.profile and step - first == PROFILE_AFTER + 1:
                    self._start_profile()
                self.checkpoints.raise_if_failed()
                state, metrics = self.program.train_step(state, next(iterator))
                # The device is busy with this step while the one before is read.
                previous, late = late, (step, metrics)
                self._record(previous, bar)
                last = step == steps
                if config.train.profile and (step - first == PROFILE_AFTER + PROFILED_STEPS or last):
                    self._stop_profile(state)
                saves = step % config.checkpoint.every == 0 or last
                evaluates = step % config.eval.every == 0 or last
                if saves or evaluates:
                    self._record(late, bar)
                    late = None
                if saves:
                    self._save(step, state, iterator)
                if evaluates:
                    scores = self._score(state)
                    losses = {f"eval/{name}/loss": score.loss for name, score in scores.items()}
                    self.writer.write(step, losses)
                    if not last and jax.process_index() == 0:
                        tqdm.write(f"step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
                if saves or evaluates:
                    self.clock.restart()
        if scores is None:  # the run had ended before
            scores = self._score(state)
        return state, scores

    def _record(self, item: tuple[int, dict[str, Any]] | None, bar: tqdm) -> None:
        """Wait for a step's metrics, show them, and write every train.log_every-th."""
        if item is None:
            return
        step, metrics = item[0], {name: np.asarray(value) for name, value in item[1].items()}
        self.clock.tick()
        bar.update(step - bar.n)
        rate = self.clock.rate()
        per_second = None if rate is None else rate * self.config.tokens_per_step
        speed = "" if rate is None else f", {per_second:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}{speed}", refresh=False)
        if step % self.config.train.log_every and step != self.config.train.steps:
            return
        device = self.program.mesh.devices.flat[0]
        values = {f"train/{name}": value for name, value in metrics.items()}
        values["tokens_per_second"] = per_second
        values["mfu"] = (
            None
            if per_second is None
            else mfu(per_second, self.flops_per_token, device.device_kind, self.program.mesh.size)
        )
        self.writer.write(step, values)
        self.clock.restart(keep_last=True)

    def _save(self, step: int, state: TrainState, iterator: Any) -> None:
        self.checkpoints.save(
            step,
            state,
            data_state={"iterator": iterator.get_state(), "train_tokens": self.data.train.num_tokens},
            config_yaml=self.config_yaml,
            wait=step == self.config.train.steps,
        )

    def _score(self, state: TrainState) -> dict[str, perplexity.Score]:
        program = self.program
        return perplexity.evaluate_sets(
            lambda batch: program.eval_step(state.params, batch),
            self.data.validation,
            batch_size=program.eval_batch_size,
            share=program.share,
            batches=self.config.eval.batches,
            progress=jax.process_index() == 0,
        )

    def _start_profile(self) -> None:
        jax.profiler.start_trace(str(self.directory / "profile"))
        self.profiling = True

    def _stop_profile(self, state: TrainState) -> None:
        if self.profiling:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.profiling = False


class _Clock:
    """Steps per second since the last restart, counted between moments when a step's result was seen."""

    def __init__(self):
        self.restart()

    def restart(self, keep_last: bool = False) -> None:
        """Forget; with keep_last the last tick starts the next interval, so that no time is lost between intervals."""
        self.begin = self.end if keep_last else None
        self.ticks = 0

    def tick(self) -> None:
        """A step's result has been seen."""
        self.end = time.perf_counter()
        if self.begin is None:
            self.begin = self.end
        else:
            self.ticks += 1

    def rate(self) -> float | None:
        """Steps per second, or None before two moments were seen."""
        return self.ticks / (self.end - self.begin) if self.ticks else None


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
