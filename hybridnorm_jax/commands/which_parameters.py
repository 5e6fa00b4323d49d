"""Which parameters of a checkpoint a command takes: averaged ones, where there are any, or those of the last step."""

from typing import NamedTuple

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.config.optimizer_kinds import averaging_settings

OPTION = "--plain"


class WhichParameters(NamedTuple):
    """What a checkpoint has, and what was asked for.

    Attributes:
      has_average: whether the run averaged its parameters (optimizer.ema_decay).
      plain: whether the parameters of the last step are taken all the same.
    """

    has_average: bool
    plain: bool

    @property
    def name(self) -> str:
        """For programs: averaged | plain."""
        return "averaged" if self.has_average and not self.plain else "plain"

    @property
    def said(self) -> str:
        """What is added to the name of the checkpoint; nothing of one that has no averaged parameters."""
        if not self.has_average:
            return ""
        return ", parameters that are not averaged" if self.plain else ", averaged parameters"


def add_option(parser: ArgumentParser) -> None:
    """Add the option that asks for the parameters of the last step."""
    parser.add_argument(
        OPTION,
        action="store_true",
        help=f"of a run that averages its parameters ({averaging_settings()}) take those of the last step, which are "
        "not averaged",
    )
