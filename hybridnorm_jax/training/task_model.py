"""A run's model and tokenizer as the LM Evaluation Harness calls them, and the scores of its tasks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.answers import Tokens, Writer
from hybridnorm_jax.evaluation.tasks import Tasks, TaskScore, evaluate_tasks, open_tasks
from hybridnorm_jax.evaluation.token_scores import TokenScorer
from hybridnorm_jax.generation.generate import generate
from hybridnorm_jax.generation.ready_parameters import ready
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.training.program import Program

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def _nothing() -> None:
    pass


class TaskModel:
    """Scores tasks with the parameters of a run; its programs are compiled once, however often they are scored.

    Attributes:
      config: of the run.
      tokenizer: of its data.
    """

    def __init__(
        self,
        program: Program,
        tokenizer: Tokenizer | None,
        tasks: Sequence[str],
        *,
        key: str,
        limit: int | None = None,
    ):
        """Find the tasks and load their data.

        Args:
          program: of the run.
          tokenizer: of its data; None: they name none.
          tasks: see evaluation.tasks.open_tasks.
          key: that names them, for messages.
          limit: of each task only so many documents, its first; None: all.

        Raises:
          UserError: see evaluation.tasks.open_tasks; or there is no tokenizer.
        """
        if tokenizer is None:
            right = "data.tokenizer names no tokenizer for these token files; name its tokenizer.json"
            raise ConfigError(f"{key}: tasks are texts; {right}")
        self.config, self.tokenizer = program.config, tokenizer
        config = program.config
        self._program, self._limit = program, limit
        self._separator = separator_id(config, tokenizer)
        self._tasks: Tasks = open_tasks(tasks, key=key, window=config.train.seq_len)
        self._scorer = functools.lru_cache(maxsize=1)(self._make_scorer)

    def _make_scorer(self, model: ModelConfig) -> TokenScorer:
        """What scores tokens with a model that does not grow."""
        program = self._program
        # The form in which a run was trained is another matter: the parameters are those of config.model.
        model = dataclasses.replace(
            model, attention=program.backend, expert_dispatch=program.dispatch or "auto", remat="none"
        )
        return TokenScorer(
            Decoder(model),
            program.mesh,
            program.rules,
            window=self.config.train.seq_len,
            batch_size=program.eval_batch_size,
        )

    def scores(
        self, params: Any, *, step: int | None = None, before_batch: Callable[[], None] = _nothing
    ) -> dict[str, TaskScore]:
        """The scores of all tasks with these parameters, the same in every process; calls before_batch now and then.

        Args:
          step: of training; needed where the model's branches grow with it. Until they are whole, every step compiles
            anew.
        """
        lm = self.for_lm_eval(params, step=step, before_batch=before_batch)
        return evaluate_tasks(lm, self._tasks, limit=self._limit)

    def for_lm_eval(self, params: Any, *, step: int | None = None, before_batch: Callable[[], None] = _nothing) -> "LM":
        """The model with these parameters as `lm_eval.evaluator` takes one; arguments as those of `scores`."""
        from hybridnorm_jax.evaluation.lm_eval_model import LmEvalModel

        model = self.config.model if step is None else self.config.model.at_step(step)
        # Where the first answer is written, not for each batch of answers.
        readied = functools.cache(lambda: ready(model, params))
        writer = Writer(
            partial(self._write, model, readied, before_batch),
            self.tokenizer,
            separator=self._separator,
            window=self.config.train.seq_len,
            batch_size=self._program.eval_batch_size,
        )
        score = partial(self._scorer(model).score, params, before_batch=before_batch)
        return LmEvalModel(self.tokenizer, score, writer, separator=self._separator)

    def _write(
        self,
        model: ModelConfig,
        params: Callable[[], Any],
        before_batch: Callable[[], None],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Mapping[str, float],
        seeds: Sequence[int],
        on_tokens: Callable[[list[Tokens]], bool],
    ) -> list[Tokens]:
        """answers.Write, with generation.generate."""

        def on_new_tokens(new: list[Tokens]) -> bool:
            before_batch()
            return on_tokens(new)

        return generate(
            model,
            params(),
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            stop_ids=() if self._separator is None else (self._separator,),
            seeds=seeds,
            on_tokens=on_new_tokens,
        )


def separator_id(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The id that ends a document: the tokenizer's, or that which token files have."""
    return config.data.separator_id if tokenizer.separator_id is None else tokenizer.separator_id
