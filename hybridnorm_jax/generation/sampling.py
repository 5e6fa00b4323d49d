"""The settings with which tokens are chosen. They need no JAX, so that help and completion come at once."""

import dataclasses

from hybridnorm_jax.config.run_config import LARGEST_SEED
from hybridnorm_jax.config_fields import check_fields, key


def fault_of_seed(seed: int) -> str | None:
    """What is wrong with a seed, as the end of a sentence; None: nothing."""
    return None if 0 <= seed <= LARGEST_SEED else f"must be between 0 and {LARGEST_SEED:,}"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The rules apply in the order of the fields. The defaults take the likeliest token.

    Raises:
      ConfigError: a value that cannot be; names the field.
    """

    repetition_penalty: float = key(
        1.0,
        "positive logits of tokens that came before are divided by it, negative ones multiplied",
        above=0,
        at_most=100,
    )
    temperature: float = key(0.0, "divides the logits; 0: the likeliest token is taken", at_least=0, at_most=100)
    top_k: int | None = key(None, "only so many of the likeliest tokens are left", at_least=1, at_most=10_000_000)
    top_p: float = key(
        1.0, "the likeliest tokens are left until their probability is at least this", above=0, at_most=1
    )
    min_p: float = key(
        0.0, "tokens are left out that are less likely than this times the likeliest", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        check_fields("", self)
