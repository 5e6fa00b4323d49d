"""Commands that only write down how they were called, in the place of gcloud, kubectl, srun and others."""

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"


class StandIns:
    """A directory of such commands, first on PATH.

    Attributes:
      environ: what a script is to run with.
    """

    def __init__(self, directory: Path):
        self._bin = directory / "stand-ins"
        self._bin.mkdir()
        self._record = directory / "calls"
        self._record.touch()
        self.environ = {"PATH": f"{self._bin}:{os.environ['PATH']}", "HOME": str(directory)}

    def add(self, name: str, *, status: int = 0, script: str = "") -> None:
        """A command that writes down its arguments, runs `script`, and ends with this status."""
        file = self._bin / name
        line = f'printf "%s\\0" {name} "$@" >> {self._record}; printf "\\n\\n" >> {self._record}'
        file.write_text(f"#!/bin/bash\n{line}\n{script}\nexit {status}\n")
        file.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """What was called, first to last: the command and its arguments."""
        calls = self._record.read_text().split("\0\n\n")
        return [call.split("\0") for call in calls if call]

    def run(self, script: str | Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        """Run a script of bash with these arguments, and with these variables besides."""
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=self.environ | environ, capture_output=True, text=True, check=False)
