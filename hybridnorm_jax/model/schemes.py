"""SCHEMES, the table of every norm placement that has a name: importing this module fills it.

The rules stand in the files schemes_*.py, which enter themselves; the order of these files is that of the table. A
new scheme is one more entry there, or in a file of yours.
"""

from hybridnorm_jax.model import (  # noqa: F401
    schemes_of_hybridnorm,
    schemes_of_others,
    schemes_of_two_streams,
    schemes_on_sphere,
    schemes_that_grow,
)
from hybridnorm_jax.model.scheme import LONGEST_NAME, SCHEMES, BlockRule, Scheme, describe, scheme, schemes
from hybridnorm_jax.model.schemes_of_hybridnorm import normalizing_qkv
from hybridnorm_jax.model.schemes_of_others import mix_ln

__all__ = (
    "LONGEST_NAME",
    "SCHEMES",
    "BlockRule",
    "Scheme",
    "describe",
    "mix_ln",
    "normalizing_qkv",
    "scheme",
    "schemes",
)
