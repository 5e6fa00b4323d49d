"""Every key with values that cannot be right: on the command line, and in a file."""

import json
import random
from collections.abc import Iterator

from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS
from hybridnorm_jax.config.key_values import Hint, read_hint
from tests.malformed.case import Case

NOT_FINITE = (".inf", "-.inf", ".nan", "inf", "nan", "1e400")
HUGE = ("1" + "0" * 400, str(2**70), "-" + "9" * 30, "1" * 5000, "1e300", "-1e300")
NO_NUMBERS = (
    "abc",
    "true",
    "[1]",
    "{a: 1}",
    "1:30",
    "0x10",
    "010",
    "2024-01-01",
    "1__0",
    "'3'",
    "--1",
    "1,5",
    "½",
    "३",
)
BY_TYPE = {
    int: {
        "wrong type": (*NO_NUMBERS, "1.5", "null", "", "~", "yes"),
        "not finite": NOT_FINITE,
        "out of range": (*HUGE, "-5", "99999999999999999999"),
    },
    float: {
        "wrong type": (*NO_NUMBERS, "null", "", "1e", "e3", "1e-3x", "yes"),
        "not finite": NOT_FINITE,
        "out of range": (*HUGE, "-0.001", "-1"),
    },
    bool: {"wrong type": ("1", "0", "yes", "off", "y", "abc", "null", "[true]", "{a: true}", ".nan", "1" * 5000)},
    str: {
        "wrong type": ("null",),
        "too long": ("x" * 100_000,),
        "control characters": ("a\x01b", "a\x1b[31mb", "\x7f"),
    },
    tuple: {
        "wrong type": ("abc", "3", "true", "{a: 1}", "[[a]]", "[{a: 1}]", "[null]", "null", "[a"),
        "too long": ("[" + "a, " * 200_000 + "a]",),
        "control characters": ('["a\\0b"]',),
    },
    dict: {
        "wrong type": ("abc", "3", "[a]", "{a: 1}", "{a: {b: [c]}}", "{a: null}", "null", "{1: 2}", "{a: b}", "{a"),
        "too long": ("{a: [" + "a, " * 200_000 + "a]}",),
    },
}
# Where null may be written, or a word may be right that no other key takes.
MAYBE = {"": "wrong type", "~": "wrong type", "null": "wrong type"}
TEXT_IN_FILES = {"null": None, "nested": {"a": {"b": 1}}, "list": ["a", ["b"]]}


def key_cases(rng: random.Random) -> Iterator[Case]:
    """Each key with each wrong value, in random order."""
    cases = [case for path in FIELDS for case in _of_key(path)]
    rng.shuffle(cases)
    yield from cases


def _of_key(path: str) -> Iterator[Case]:
    hint = read_hint(FIELDS[path].type)
    kind = getattr(hint.kind, "__origin__", hint.kind)
    for fault, values in BY_TYPE[kind].items():
        for value in values:
            if not (value in MAYBE and hint.optional):
                yield Case(f"key=value: {fault}", ("train", "tiny.yaml", f"{path}={value}"), (path,))
    section, _, name = path.rpartition(".")
    for fault, content in _in_files(hint, kind):
        text = f"{section}:\n  {name}: {content}\n" if section else f"{name}: {content}\n"
        yield Case(
            f"key in a file: {fault}",
            ("train", "tiny.yaml", "bad.yaml"),
            (path, "bad.yaml"),
            {"bad.yaml": text.encode()},
        )
    if section:
        text = json.dumps({section: {name: {"inner": {"more": 1}}}})
        kind = "key in a file: nested"
        yield Case(kind, ("train", "tiny.yaml", "bad.yaml"), (path,), {"bad.yaml": text.encode()})


def _in_files(hint: Hint, kind: type) -> Iterator[tuple[str, str]]:
    for fault, values in BY_TYPE[kind].items():
        for value in values:
            # A control character in a file is broken YAML, of which yaml_cases.py has many.
            if not (value in MAYBE and hint.optional) and value.isprintable():
                yield fault, value


def random_key_cases(rng: random.Random) -> Iterator[Case]:
    """One key after another with a value drawn by chance, which may be right."""
    keys = list(FIELDS)
    while True:
        path = rng.choice(keys)
        value = _anything(rng)
        # A path is named by itself, and so is a text that is neither empty nor odd.
        names = (
            path.rpartition(".")[2],
            *([value.strip()[:15]] if value.strip().isprintable() and value.strip() else []),
        )
        yield Case("key=value: by chance", ("train", "tiny.yaml", f"{path}={value}"), names, refused=False)


def _anything(rng: random.Random) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        return str(rng.randrange(-10, 10) * 10 ** rng.randrange(40))
    if kind == 1:
        return repr(rng.choice((-1, 1)) * 10 ** rng.uniform(-300, 300))
    if kind == 2:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0xD7FF)))) for _ in range(rng.randrange(12))
        )
    if kind == 3:
        return json.dumps([rng.choice((1, "a", None, [], {}, 1e9)) for _ in range(rng.randrange(4))])
    if kind == 4:
        return rng.choice(
            ("null", "true", "false", "~", "", ".inf", "auto", "none", "[]", "{}", "''", '"a\\u0001"', "#")
        )
    return "".join(rng.choice("[]{},:'\"&*!|>%@`-?#\\ ae1.") for _ in range(rng.randrange(1, 15)))


def section_cases(rng: random.Random) -> Iterator[Case]:
    """Sections that hold no keys, unknown keys, and keys one level too deep."""
    for section in SECTIONS:
        for content in ("3", "[a]", "abc", "true", "{x: 1}", "{? [a] : 1}"):
            text = f"{section}: {content}\n".encode()
            yield Case("section", ("train", "tiny.yaml", "bad.yaml"), (section, "bad.yaml"), {"bad.yaml": text})
        yield Case("section", ("train", "tiny.yaml", f"{section}=3"), (section,))
