"""What a planted fault is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """A piece of the package's source, and what it would be if somebody had got it wrong.

    Attributes:
      name: what is wrong, as an identifier.
      file: below hybridnorm_jax/.
      right: stands in the file exactly once.
      wrong: stands there instead while the fault is planted.
      tests: files below tests/, or tests in them as pytest names them, of which at least one test must fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
