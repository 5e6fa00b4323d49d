"""A model of ours as the LM Evaluation Harness calls one. Importing this module imports lm_eval, the extra `eval`."""

from collections.abc import Callable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from hybridnorm_jax.data import Tokenizer
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.evaluation import text_requests
from hybridnorm_jax.evaluation.answers import Question, Writer
from hybridnorm_jax.evaluation.token_requests import Request
from hybridnorm_jax.evaluation.token_scores import TokenScore


class LmEvalModel(LM):
    """Tokenizes the harness's requests, and has them scored or answered.

    To the harness it is one process, also where there are several: each of them is given all requests, and has all
    results.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        score: Callable[[Sequence[Request]], list[TokenScore]],
        writer: Writer,
        *,
        separator: int | None,
    ):
        """Keep what is given.

        Args:
          tokenizer: of the model.
          score: scores continuations.
          writer: answers questions.
          separator: the id with which documents begin; None: there is none, and what needs it is refused.
        """
        super().__init__()
        self._tokenizer, self._score, self._writer = tokenizer, score, writer
        self._separator = separator

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of (context, continuation) requests."""
        pairs = [request.args for request in requests]
        if not all(context.strip() for context, _ in pairs):
            self._check_separator("an empty context")
        asked = text_requests.continuations(self._tokenizer, pairs, separator=self._separator)
        return [(score.log_likelihood, score.is_greedy) for score in self._score(asked)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability of whole texts, each token predicted once after as many as fit; the separator before."""
        separator = self._check_separator("loglikelihood_rolling")
        texts = [request.args[0] for request in requests]
        asked = text_requests.documents(self._tokenizer, texts, separator=separator)
        return [score.log_likelihood for score in self._score(asked)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to a stop string."""
        return self._writer.answers([Question(*request.args) for request in requests])

    def _check_separator(self, what: str) -> int:
        if self._separator is None:
            raise UserError(f"{what}: the tokenizer has no separator to begin a text with; name data.separator")
        return self._separator
