"""JSON that is read without recursion is what Python's parser reads."""

import json
import random
import re

import pytest

from hybridnorm_jax.data.text.deep_json import Unread, kind_of, read_strings

PIECES = ["{", "}", "[", "]", ",", ":", '"a"', "1", "-0.5e3", "null", "true", "x", "01", '"b\\n"', " ", '"\\q"', '"']
SCALARS = ["1", '"s"', "null", "true", "false", "-2.5E+3", '""', '"\\u00e4"', "NaN"]


def some_json(chance: random.Random, depth: int = 0) -> str:
    kind = chance.random() if depth < 5 else 0
    if kind < 0.4:
        return chance.choice(SCALARS)
    parts = [some_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind < 0.7:
        return "[" + chance.choice([",", " , "]).join(parts) + "]"
    return "{" + ",".join(f'"{chance.choice("abc")}":{part}' for part in parts) + "}"


def damaged(chance: random.Random, text: str) -> str:
    pieces = list(text)
    for _ in range(chance.randrange(3)):
        place = chance.randrange(len(pieces) + 1)
        pieces[place : place + chance.randrange(2)] = [chance.choice(PIECES)] * chance.randrange(2)
    return "".join(pieces)


def by_python(text: str) -> object:
    found = json.loads(text)
    if isinstance(found, dict):
        return {name: value if isinstance(value, str) else Unread(kind_of(value)) for name, value in found.items()}
    return found if isinstance(found, str) else Unread(kind_of(found))


def result(read, text: str) -> object:
    try:
        return read(text)
    except ValueError:
        return "not JSON"


def test_the_same_texts_are_json():
    chance = random.Random(0)
    texts = [damaged(chance, some_json(chance)) for _ in range(5000)]
    assert 500 < sum(result(by_python, text) == "not JSON" for text in texts) < 4500
    assert [text for text in texts if result(read_strings, text) != result(by_python, text)] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"a": [}', "a value or ']' must stand at column 8, not '}'"),
        ('{"a": 1} 2', "nothing must stand at column 10"),
        ('{"a" 1}', "':' must stand at column 6"),
        ('{"a": "\\q"}', "Invalid \\escape at column 8"),
        ("[" * 5, "ends inside"),
        ("", "ends inside"),
        ('{"a": "b', "a string without end at column 7"),
    ],
)
def test_what_is_wrong_is_said_with_its_column(text, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        read_strings(text)
