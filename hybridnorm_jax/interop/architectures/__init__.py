"""The architectures of transformers: one entry for each, in a small file for each family.

An entry says what a config.json means as a ModelConfig, which tensors hold our leaves, and how; the same entry serves
reading and writing. A key that no entry reads, or a value that is not implemented, is refused. An absent key means the
default of the architecture's class in transformers, which leaves defaults out when it writes. registry.py lists them.
How to add one: docs/architectures.md. What an entry is made of is in ../hf_architecture.py and ../tensor_places.py;
nothing elsewhere asks for an architecture by its name.
"""

from hybridnorm_jax.interop.architectures.registry import (
    ALL,
    ARCHITECTURES,
    architecture_of,
    check_class,
    config_from_json,
    config_to_json,
)
from hybridnorm_jax.interop.mathematics import mathematics

__all__ = [
    "ALL",
    "ARCHITECTURES",
    "architecture_of",
    "check_class",
    "config_from_json",
    "config_to_json",
    "mathematics",
]
