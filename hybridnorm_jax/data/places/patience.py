"""Requests to stores that may be slow or fail: each has a time limit, and is made again a few times, with longer waits.

What trying again cannot mend (a file that is not there, a missing credential) ends at once. Either way one line says
which file it is and what its store said.
"""

import random
import sys
import threading
from collections.abc import Callable
from time import sleep
from typing import Any, TypeVar

from hybridnorm_jax.errors import DataError, first_line

TRIES = 5
# Seconds before the second try; twice as many before each further one. Less by up to a half, at random: the processes
# of a run, which fail together, do not come back together.
FIRST_WAIT = 1.0
# Of one request, which asks for a piece of PIECE_BYTES at most. So less than 70 kB/s is a failure.
REQUEST_SECONDS = 120.0
PIECE_BYTES = 8 << 20
# Answers that may be another one later: too many requests, and what a server blames on itself.
FLEETING_STATUS = (408, 425, 429)
ABSENT = (404, 410)
# Faults of this program, not of a store.
_OWN = (TypeError, AttributeError, NameError, AssertionError, ImportError, DataError)
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "LocalTokenNotFoundError",
)
_REFUSED = ("PermissionError", "GatedRepoError", "RefreshError", "ProfileNotFound")
_ABSENT_KINDS = ("FileNotFoundError", "RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError")
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws; of a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; of a public bucket set FSSPEC_GS_TOKEN=anon",
    "hf": "run hf auth login, or set HF_TOKEN",
    "https": "some servers say so of a file that is not there: is the address right?",
}

T = TypeVar("T")


class AccessRefusedError(DataError):
    """A store does not show a file. Some say so too of a file that is not there, if they may not list their files."""


class ServerError(OSError):
    """A server's answer that is no file: its HTTP status, and what it says."""

    def __init__(self, status: int, reason: str):
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status = status


def patiently(place: object, request: Callable[[], T]) -> T:
    """What a request returns, made up to TRIES times.

    Args:
      place: the file, for messages.
      request: takes REQUEST_SECONDS at most, or counts as failed.

    Raises:
      AccessRefusedError: the store does not show the file.
      DataError: anything else. Both name the file and the cause.
    """
    for number in range(1, TRIES + 1):
        try:
            return _in_time(request)
        except _OWN:
            raise
        except Exception as error:  # every library of a store has errors of its own
            if final := _final(place, error):
                raise final from error
            if number == TRIES:
                right = "is the place reachable and well? The same command goes on where it can"
                raise DataError(f"{place}: cannot be read after {TRIES} tries ({cause_of(error)}); {right}") from error
            wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1)
            again = f"trying again in {wait:.1f} s ({number + 1} of {TRIES})"
            print(f"{place}: {cause_of(error)}; {again}", file=sys.stderr, flush=True)
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _in_time(request: Callable[[], T]) -> T:
    """What the request returns, in a thread of its own: none of the libraries has a limit for all that it does."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((True, request()))
        except BaseException as error:
            result.extend((False, error))

    thread = threading.Thread(target=run, daemon=True, name="a request to a store")
    thread.start()
    thread.join(REQUEST_SECONDS)
    if len(result) < 2:
        raise TimeoutError(f"no answer in {REQUEST_SECONDS:g} s")
    succeeded, value = result
    if not succeeded:
        raise value
    return value


def cause_of(error: BaseException) -> str:
    """What went wrong, in a few words."""
    line = first_line(error)
    kind = type(error).__name__
    return line if isinstance(error, OSError) and line != kind else f"{kind}: {line}" if line != kind else kind


def _final(place: object, error: Exception) -> DataError | None:
    """What is said of an error that trying again cannot mend; None of one that it may."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = status_of(error)
    right = CREDENTIALS.get(str(place).partition("://")[0], "")
    right = f"; {right}" if right else ""
    if kinds & set(_NO_CREDENTIALS):
        return DataError(f"{place}: no credentials ({cause_of(error)}){right}")
    if kinds & set(_REFUSED) or status in (401, 403):
        return AccessRefusedError(f"{place}: access is refused ({cause_of(error)}){right}")
    if kinds & set(_ABSENT_KINDS) or status in ABSENT:
        return DataError(f"{place}: no such file; it was removed, or its name is another")
    if status is not None and 300 <= status < 400:
        return DataError(f"{place}: its server leads to where nobody should follow ({cause_of(error)})")
    if status is not None and 400 <= status < 500 and status not in FLEETING_STATUS:
        return DataError(f"{place}: the request is refused ({cause_of(error)})")
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of any library is about; None where it is about none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    candidates = (getattr(error, "status", None), getattr(error, "code", None), response)
    for found in (*candidates, getattr(response, "status_code", None)):
        if isinstance(found, int) and 100 <= found < 600:
            return found
    if error.__cause__ is not None and error.__cause__ is not error:
        return status_of(error.__cause__)
    return None
