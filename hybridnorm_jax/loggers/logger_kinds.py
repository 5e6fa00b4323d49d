"""LOGGERS, the table of every logger that a run can have (run.loggers).

One of your own is one more entry, in a file of your own that run.plugins names:

    import hybridnorm_jax as hn

    @hn.logger_kind("tsv")
    class Tsv(hn.Logger):
        def write(self, step, values):
            with open("losses.tsv", "a") as file:
                file.write(f"{step}\\t{values.get('train/loss')}\\n")

`hybridnorm train run.plugins=[my_logger.py] 'run.loggers=[tensorboard, tsv]'` then writes with it.

A service's package is imported when its logger is made, so that the names can be listed at once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable

from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.loggers.logger import Logger

LONGEST_NAME = 60
# A process has one run of it at a time.
WANDB = "wandb"


@dataclasses.dataclass(frozen=True)
class LoggerKind:
    """A kind of logger.

    Attributes:
      title: what it is called in messages.
      make: makes a new one.
      packages: what it imports, which the extra `extra` brings.
    """

    title: str
    make: Callable[[], Logger]
    packages: tuple[str, ...] = ()
    extra: str = ""


def _tensorboard() -> Logger:
    from hybridnorm_jax.loggers.tensorboard import TensorBoard

    return TensorBoard()


def _csv() -> Logger:
    from hybridnorm_jax.loggers.csv_table import CsvTable

    return CsvTable()


def _wandb() -> Logger:
    from hybridnorm_jax.loggers.wandb_run import WandbRun

    return WandbRun()


def _mlflow() -> Logger:
    from hybridnorm_jax.loggers.mlflow_run import MlflowRun

    return MlflowRun()


LOGGERS: dict[str, LoggerKind] = {
    "tensorboard": LoggerKind("TensorBoard", _tensorboard),
    "csv": LoggerKind("metrics.csv", _csv),
    WANDB: LoggerKind("Weights & Biases", _wandb, packages=("wandb",), extra="wandb"),
    "mlflow": LoggerKind("MLflow", _mlflow, packages=("mlflow",), extra="mlflow"),
}
BUILT_IN = tuple(LOGGERS)


def logger_kind(name: str) -> Callable[[type[Logger]], type[Logger]]:
    """Decorator: register a subclass of Logger under a name for run.loggers; it is made without arguments.

    Raises:
      ValueError: the name is no short identifier or a built-in logger's, or this is no subclass of Logger.
    """
    if not (isinstance(name, str) and name.isidentifier() and len(name) <= LONGEST_NAME) or name in BUILT_IN:
        taken = ", ".join(BUILT_IN)
        raise ValueError(f"a logger is named {name!r:.80}: must be a short identifier, and none of {taken}")

    def register(made: type[Logger]) -> type[Logger]:
        if not (isinstance(made, type) and issubclass(made, Logger)):
            raise ValueError(f"the logger {name}: {made!r:.80} is no subclass of hn.Logger")
        LOGGERS[name] = LoggerKind(name, made)
        return made

    return register


def run_loggers(names: Iterable[str], given: Iterable[Logger] = ()) -> dict[str, Logger]:
    """The loggers of a run, each under what it is called in messages: a new one of each name, and those that are given.

    Raises:
      MissingExtraError: what one of them needs is not installed.
      UserError: something that is given is no logger.
    """
    loggers = {LOGGERS[name].title: _made(name) for name in names}
    for logger in given:
        if not isinstance(logger, Logger):
            raise UserError(f"loggers: {logger!r} is no object of a subclass of Logger; make one, such as MyLogger()")
        name = type(logger).__name__
        loggers[name if name not in loggers else f"{name} {len(loggers) + 1}"] = logger
    return loggers


def _made(name: str) -> Logger:
    kind = LOGGERS[name]
    for package in kind.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(f"run.loggers={name}", extra=kind.extra) from error
    return kind.make()
