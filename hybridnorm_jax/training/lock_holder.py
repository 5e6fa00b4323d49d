"""Who holds the lock of a run's directory, as the file `lock` says; run_lock.py takes it. Nothing here imports JAX."""

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "lock"


def holder() -> dict[str, Any]:
    """Who this process is."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now, "among": _processes_that_are_seen()}


def _processes_that_are_seen() -> str:
    """What a process number means something in: this start of the machine, and this namespace of processes.

    Containers on one machine may have its host name and process numbers of their own. "" where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def holder_text(content: bytes) -> str:
    """Who wrote this into a lock, for messages."""
    try:
        found = json.loads(content)
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def runs_here(content: bytes) -> bool | None:
    """Whether the process of this machine that wrote this into a lock runs; None where it is of another machine."""
    try:
        found = json.loads(content)
        process = int(found["process"])
        if (found["host"], found.get("among")) != (socket.gethostname(), _processes_that_are_seen()):
            return None
        return _runs(process)
    except (ValueError, KeyError, TypeError):
        return None


def is_of_ended_process(content: bytes) -> bool:
    """Whether a lock was left by a process of this machine that is no more, and whose number this one has not got."""
    return runs_here(content) is False and json.loads(content)["process"] != os.getpid()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        # Behind the name of its program, which is in brackets: Z of one that has ended and that nobody has asked about.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, IndexError):  # another user's, or a system without /proc
        return True
