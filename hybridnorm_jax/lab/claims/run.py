"""`hybridnorm lab claims`: measure claims of the papers, print a row for each, and write claims.json."""

import dataclasses
import datetime
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.config_fields import check, check_fields, key
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.claims.claim import COMMAND, PaperClaim, find_claims
from hybridnorm_jax.lab.run_results import hardware
from hybridnorm_jax.whole_files import expanded, write_whole

FILE = "claims.json"


@dataclasses.dataclass(frozen=True)
class ClaimOptions:
    """Where it is written."""

    out: str = key("runs/lab-claims", f"directory for {FILE}")

    def __post_init__(self) -> None:
        check_fields("", self)
        check(bool(self.out), "out", self.out, "must name a directory")


def run(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Measure what `[ID ...] [out=DIR]` asks for; without ids all cheap claims.

    A claim that takes longer is not measured: its row says what the table knows, and which commands test it.

    Returns:
      An entry for each claim, as claims.json has them.

    Raises:
      UserError: one line, before anything is measured.
    """
    options, ids = take(ClaimOptions, arguments)
    for argument in ids:
        if "=" in argument:
            raise ConfigError(f"{argument}: claims are measured with models of their own; out=DIR is the only key")
    asked = find_claims(ids)
    out = Path(expanded(options.out))
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    print(_row("claim", "verdict", "number"))
    for claim in asked:
        if claim.cheap:
            entries.append(measured(claim))
            print(_row(claim.id, entries[-1]["verdict"], entries[-1]["number"]), flush=True)
    known = [claim for claim in asked if not claim.cheap]
    if known:
        print("\nNot measured now; what was found before, and the commands:")
    for claim in known:
        entries.append(_entry(claim))
        print(_row(claim.id, claim.verdict, " ".join([claim.number, *([f"({claim.date})"] if claim.date else [])])))
        for command in claim.commands:
            print(f"    {command}")
    found = {
        "command": shlex.join([*shlex.split(COMMAND), *arguments]),
        "versions": {"jax": jax.__version__},
        "claims": entries,
    }
    write_whole(out / FILE, json.dumps(found, indent=1) + "\n")
    print(f"\n{out / FILE}")
    return entries


def measured(claim: PaperClaim) -> dict[str, Any]:
    """The entry of a cheap claim, with what is found now."""
    # Training, which most of the measures import, takes seconds to import.
    from hybridnorm_jax.lab.claims.measures import MEASURES

    began = time.perf_counter()
    finding = MEASURES[claim.id]()
    now = {
        "number": finding.number,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": hardware(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return _entry(claim) | now


def _entry(claim: PaperClaim) -> dict[str, Any]:
    return dataclasses.asdict(claim)


def _row(name: str, verdict: str, number: str) -> str:
    return f"{name:32}{verdict:20}{number}"
