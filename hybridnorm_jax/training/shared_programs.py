"""What runs of one process can share: the compiled steps of the run before."""

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.remat_choice import checked_program


class SharedPrograms:
    """Keeps the program of the newest run, whose compiled steps the next run takes if its own would be the same.

    Only the newest: programs of many structures would fill the memory, so runs of one structure should follow one
    another. What is compiled for another structure is dropped.
    """

    def __init__(self):
        self._newest: Program | None = None

    def program(self, config: RunConfig) -> Program:
        """The program of a run, with the compiled steps of the run before where they are the same.

        Raises:
          ConfigError: as checked_program.
        """
        shared = None if self._newest is None else self._newest.sharing(config)
        if shared is not None:
            return shared
        if self._newest is not None:
            self._newest = None
            jax.clear_caches()
        return checked_program(config)

    def has(self, config: RunConfig) -> bool:
        """Whether a run finds its compiled steps here."""
        return self._newest is not None and self._newest.sharing(config) is not None

    def keep(self, program: Program) -> None:
        """Keep the program of a run that begins, with everything that it will have compiled."""
        self._newest = program
