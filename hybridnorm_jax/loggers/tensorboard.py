"""Event files for TensorBoard, written at once: the writer of tensorboardX hangs for ever where its thread fails.

An event file is a sequence of records: length as uint64, its checksum, an Event in the wire format of protocol buffers,
its checksum. Source: TensorFlow's TFRecord format; checksums are masked CRC-32C, those of tensorboardX.
"""

import re
import secrets
import socket
import struct
import time
from collections.abc import Mapping

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from hybridnorm_jax.append_only import AppendOnlyFile
from hybridnorm_jax.loggers.logger import LoggedRun, Logger
from hybridnorm_jax.whole_files import is_local

# Bytes are uploaded several times over (append_only.py), so not for every step.
UPLOAD_SECONDS = 60
STAMP = re.compile(r"\.tfevents\.(\d+)\.")


class TensorBoard(Logger):
    """Writes event files to <run>/tensorboard, a new one whenever the run goes on.

    TensorBoard hides the values of superseded steps. A directory without event files gets those of the whole history.
    """

    def start(self, run: LoggedRun) -> Mapping[str, int]:
        """Begin a file, which is made by the first `write`."""
        directory = run.directory / "tensorboard"
        is_new = not directory.exists() or not any(STAMP.search(path.name) for path in directory.iterdir())
        resume_step = None if is_new else run.resume_step
        self._events = EventFile(directory, first=0 if resume_step is None else resume_step + 1)
        return {} if is_new else run.last_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values to the file."""
        self._events.write(step, values)

    def close(self, how: str) -> None:
        """Write what is held back, and release the file."""
        self._events.close()


class EventFile:
    """One event file of a run; each process that goes on with the run makes its own.

    Args:
      directory: made by the first `write`; local or gs://.
      first: TensorBoard hides what earlier files of the directory hold of this step and later ones.

    Methods raise OSError where the file cannot be written.
    """

    def __init__(self, directory: epath.Path, *, first: int):
        self._directory = directory
        self._file: AppendOnlyFile | None = None
        start = Event(step=first, session_log=SessionLog(status=SessionLog.START))
        self._held = _record(Event(file_version="brain.Event:2")) + _record(start)
        self._pause = 0.0 if is_local(directory) else UPLOAD_SECONDS
        self._next = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step. They are in the file when this returns; on gs:// within a minute or so."""
        self._held += b"".join(_record(Event(step=step, summary=scalar(name, value))) for name, value in values.items())
        if time.monotonic() >= self._next:
            self._flush()

    def close(self) -> None:
        """Write what is held back, and release the file."""
        self._flush()
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        if self._file is None:
            self._directory.mkdir(exist_ok=True)  # no parents: a run directory that was removed stays so
            self._file = AppendOnlyFile(self._directory / self._new_name())
        self._file.append(self._held)
        self._held = b""
        self._next = time.monotonic() + self._pause

    def _new_name(self) -> str:
        """A name that no other file has, after all others: TensorBoard reads them in the order of their names."""
        matches = (STAMP.search(path.name) for path in self._directory.iterdir())
        newest = max((int(match[1]) for match in matches if match), default=0)
        stamp = max(int(time.time()), newest + 1)  # the clock may have been set back
        return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{secrets.token_hex(4)}"


def _record(event: Event) -> bytes:
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
