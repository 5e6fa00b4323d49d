"""The table of the papers' claims, claims.yaml, as dataclasses; and what measuring one of them found."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.config.yaml_nodes import Node, Scalar, read_yaml
from hybridnorm_jax.errors import ConfigError, UserError, did_you_mean

TABLE = Path(__file__).with_name("claims.yaml")
HELD, FAILED, UNTOLD = "held", "did not hold", "cannot be told here"
VERDICTS = (HELD, FAILED, UNTOLD)
PAPERS = ("HybridNorm", "Pre-(C)RMSNorm", "SpanNorm", "common ground")
COMMAND = "hybridnorm lab claims"
NOT_RUN = "not run yet"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a measurement says of a claim.

    Attributes:
      number: what was measured, in words and numbers.
      holds: whether it agrees with the claim; None: it does not tell.
      reason: why it does not tell; empty where it does.
    """

    number: str
    holds: bool | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        if self.holds is None:
            return UNTOLD
        return HELD if self.holds else FAILED


@dataclasses.dataclass(frozen=True)
class PaperClaim:
    """An entry of claims.yaml.

    Attributes:
      id: names it, such as `theorem-2`.
      paper: one of PAPERS.
      source: its section, equation, figure or table.
      statement: the claim and what counts as true here, in one sentence.
      cheap: whether `hybridnorm lab claims` measures it, in seconds to two minutes on two CPU cores.
      commands: the commands that test it; of a cheap claim the one of this program, which need not be written.
      scale: of the models it was, or is to be, tested with.
      number: what was found; NOT_RUN where nothing was.
      date, machine: when and on what it was found; empty where nothing was.
      verdict: one of VERDICTS.
      reason: why it cannot be told; empty where it is.
      note: what else belongs to the verdict; may be empty.
    """

    id: str
    paper: str
    source: str
    statement: str
    scale: str
    cheap: bool = False
    commands: tuple[str, ...] = ()
    number: str = NOT_RUN
    date: str = ""
    machine: str = ""
    verdict: str = UNTOLD
    reason: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.cheap and not self.commands:
            object.__setattr__(self, "commands", (f"{COMMAND} {self.id}",))
        self._check(self.paper in PAPERS, "paper", f"must be {', '.join(PAPERS)}")
        self._check(self.verdict in VERDICTS, "verdict", f"must be {', '.join(VERDICTS)}")
        is_open = self.verdict == UNTOLD
        self._check(not is_open or not self.date or bool(self.reason), "reason", "needed where it cannot be told")
        self._check(is_open or bool(self.date), "date", "needed where there is a verdict")
        self._check(bool(self.commands), "commands", "at least one is needed")
        self._check(bool(self.date) == bool(self.machine), "date", "goes with machine")

    def _check(self, is_right: bool, field: str, right: str) -> None:
        if not is_right:
            raise ConfigError(f"{TABLE.name}: {self.id}: {field}={getattr(self, field)}: {right}")


def read_claims(text: str | None = None) -> dict[str, PaperClaim]:
    """The claims of the table by their ids, in its order.

    Args:
      text: in the place of the table's.

    Raises:
      ConfigError: an entry is not as PaperClaim says, or two have one id.
    """
    tree = read_yaml(TABLE.read_text(encoding="utf-8") if text is None else text, TABLE.name)
    if not isinstance(tree, list):
        raise ConfigError(f"{TABLE.name}: must be a list of claims")
    claims: dict[str, PaperClaim] = {}
    for entry in tree:
        claim = _claim(entry)
        if claim.id in claims:
            raise ConfigError(f"{TABLE.name}: {claim.id}: two claims have this id")
        claims[claim.id] = claim
    return claims


def find_claims(ids: Sequence[str]) -> list[PaperClaim]:
    """The claims of these ids, once each; all where none is given.

    Raises:
      UserError: there is no claim of such an id.
    """
    claims = read_claims()
    for name in ids:
        if name not in claims:
            raise UserError(f"{name}: no such claim{did_you_mean(name, claims)}")
    return [claims[name] for name in dict.fromkeys(ids)] if ids else list(claims.values())


def _claim(entry: Node) -> PaperClaim:
    if not isinstance(entry, dict):
        raise ConfigError(f"{TABLE.name}: an entry is no map of keys and values")
    fields = {field.name: field for field in dataclasses.fields(PaperClaim)}
    name = _text(entry.get("id", Scalar("?", plain=True)))
    for key in entry:
        if key not in fields:
            raise ConfigError(f"{TABLE.name}: {name}: {key}: no such key{did_you_mean(key, fields)}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in entry]
    if missing:
        raise ConfigError(f"{TABLE.name}: {name}: {missing[0]} is missing")
    values: dict[str, Any] = {key: _text(node) for key, node in entry.items() if key != "commands"}
    if "cheap" in values:
        values["cheap"] = values["cheap"] == "true"
    commands = entry.get("commands", [])
    if not isinstance(commands, list):
        raise ConfigError(f"{TABLE.name}: {name}: commands: must be a list")
    return PaperClaim(**values, commands=tuple(_text(command) for command in commands))


def _text(node: Node) -> str:
    if not isinstance(node, Scalar):
        raise ConfigError(f"{TABLE.name}: a list or a map stands where a text should")
    return " ".join(node.text.split())
