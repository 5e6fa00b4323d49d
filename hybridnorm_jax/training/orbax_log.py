"""Orbax's own log, silenced."""

import contextlib
import logging
from collections.abc import Iterator


class _OrbaxRecords(logging.Filter):
    """Drops log records that come from Orbax or TensorStore."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "/orbax/checkpoint/" not in record.pathname and "tensorstore" not in record.getMessage()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Without Orbax's log: its threads write a page of traceback for each error that is raised here as well."""
    records = _OrbaxRecords()
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(records)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(records)
