"""Writes the papers' claims with their verdicts into results.md beside this file.

    python docs/write_claims.py [CLAIMS.json ...]

The claims are those of hybridnorm_jax/lab/claims/claims.yaml. What `hybridnorm lab claims` has measured, and written
into a claims.json, is first entered into that table. A test compares the page with what this writes.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybridnorm_jax.lab.claims.claim import PAPERS, TABLE, VERDICTS, PaperClaim, read_claims

PAGE = Path(__file__).with_name("results.md")
BEGIN, END = "<!-- This table is written by docs/write_claims.py -->\n", "<!-- until here -->\n"
# What a measurement enters into the table.
FOUND = ("number", "date", "machine", "verdict", "reason")


def entered(text: str, found: Iterable[Mapping[str, Any]]) -> str:
    """The table's text with what was found.

    Args:
      found: entries of a claims.json; those of claims that were not measured change nothing.
    """
    for entry in found:
        if "seconds" not in entry:
            continue
        before, start, rest = text.partition(f"- id: {entry['id']}\n")
        assert start, f"{TABLE.name} has no claim {entry['id']}"
        body, blank, after = rest.partition("\n\n")
        if not blank:  # the last entry of the file
            body, blank = body.removesuffix("\n"), "\n"
        kept = [line for line in body.splitlines() if not re.match(rf"  ({'|'.join(FOUND)}):", line)]
        new = [f"  {key}: {json.dumps(entry[key], ensure_ascii=False)}" for key in FOUND if entry[key]]
        text = before + start + "\n".join([*kept, *new]) + blank + after
    return text


def section(claims: Iterable[PaperClaim]) -> str:
    """The counts, a table for each paper, and the machines."""
    claims = list(claims)
    counts = ", ".join(f"{sum(claim.verdict == verdict for claim in claims)} {verdict}" for verdict in VERDICTS)
    parts = [f"Of {len(claims)} claims: {counts}."]
    for paper in PAPERS:
        rows = [row(claim) for claim in claims if claim.paper == paper]
        heading = ["| claim | source | verdict | found | tested with |", "|---|---|---|---|---|"]
        parts += [f"### {paper[0].upper()}{paper[1:]}", "\n".join([*heading, *rows])]
    machines = sorted({(claim.date, claim.machine) for claim in claims if claim.date})
    parts.append("Machines: " + "; ".join(f"{date}, {machine}" for date, machine in machines) + ".")
    return "\n\n".join(parts) + "\n"


def row(claim: PaperClaim) -> str:
    """A claim's row."""
    found = f"{claim.number} ({claim.date})" if claim.date else claim.number
    notes = [text for text in (claim.reason, claim.note) if text]
    commands = [f"`{command}`" for command in claim.commands]
    cells = (
        f"**{claim.id}**: {claim.statement}",
        claim.source,
        claim.verdict,
        "; ".join([found, *notes]),
        "<br>".join([claim.scale, *commands]),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The page with the tables in their place."""
    before, found, rest = PAGE.read_text().partition(BEGIN)
    assert found, f"{PAGE}: has lost the line {BEGIN!r}"
    return before + found + "\n" + section(read_claims().values()) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    for file in sys.argv[1:]:
        TABLE.write_text(entered(TABLE.read_text(), json.loads(Path(file).read_text())["claims"]))
    PAGE.write_text(page())
