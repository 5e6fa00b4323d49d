"""YAML files that are no configuration."""

import random
from collections.abc import Iterator

from tests.malformed.case import Case
from tests.malformed.templates import TINY

BOMB = b"a: &a [x, x]\n" + b"".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}, *{chr(97 + n)}, *{chr(97 + n)}]\n".encode()
    for n in range(20)
)
FILES = {
    "a tab": b"train:\n\tsteps: 3\n",
    "twice": b"train: {steps: 3}\ntrain: {seed: 1}\n",
    "a key twice": b"train:\n  steps: 3\n  steps: 4\n",
    "a bomb of anchors": BOMB,
    "a circle": b"train: &a\n  steps: *a\n",
    "an alias of nothing": b"train: {steps: *nowhere}\n",
    "an anchor": b"train: {steps: &a 3, seed: *a}\n",
    "a merge": b"train: &a {steps: 3}\nmodel:\n  <<: *a\n",
    "a merge of a number": b"train:\n  <<: 3\n",
    "a merge of a map": b"train:\n  <<: {steps: 3}\n",
    "a tag": b"train: {steps: !!int 3}\n",
    "python's object": b"run: {name: !!python/object/apply:os.system ['touch ran']}\n",
    "python's name": b"run: {name: !!python/name:os.system }\n",
    "binary": b"run: {name: !!binary aGFsbG8=}\n",
    "a set": b"data: {validation: !!set {a, b}}\n",
    "an unknown tag": b"run: {name: !mine x}\n",
    "a tag directive": b"%TAG ! tag:a,2000:\n---\nrun: {name: !x y}\n",
    "two documents": b"train: {steps: 3}\n---\ntrain: {steps: 4}\n",
    "a list": b"- train\n- steps\n",
    "a number": b"7\n",
    "a text": b"train.steps=3\n",
    "a long text": b"x" * 10_000_000,
    "null": b"null\n",
    "NUL": b"train: {steps: 3}\n\0\n",
    "latin-1": "run: {name: \xe9t\xe9}\n".encode("latin-1"),
    "UTF-16": TINY.encode("utf-16"),
    "UTF-32": TINY.encode("utf-32"),
    "escape": b"run: {name: \x1b[31m}\n",
    "a surrogate": b"run: {name: \xed\xa0\x80}\n",
    "deep lists": b"train: {steps: " + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
    "deep maps": b"train: " + b"{a: " * 10_000 + b"1" + b"}" * 10_000 + b"\n",
    "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(1500)),
    "deep and open": b"[" * 100_000,
    "10 MB of keys": b"".join(b"k%d: 1\n" % n for n in range(1_000_000)),
    "10 MB of a list": b"data: {files: [" + b"a, " * 3_000_000 + b"]}\n",
    "10 MB of a comment": b"#" + b"x" * 10_000_000 + b"\ntrain: {step: 1}\n",
    "open quotes": b'run: {name: "abc}\n',
    "open braces": b"train: {steps: 3\n",
    "a wrong indent": b"train:\n  steps: 3\n seed: 1\n",
    "a key of a list": b"? [a, b]\n: 1\n",
    "a key of a map": b"? {a: b}\n: 1\n",
    "a key of null": b"~: 1\n",
    "a key of a number": b"1: 2\n",
    "an empty key": b"'': 2\n",
    "a key of many letters": b"x" * 500 + b": 1\n",
    "an escape in a key": b'"tr\\nain": 1\n',
    "a wrong escape": b'run: {name: "\\q"}\n',
    "percent": b"%YAML 9.9\n---\ntrain: {steps: 3}\n",
    "a block text": b"train:\n  steps: |\n    3\n",
    "a date": b"train: {steps: 2024-01-01}\n",
    "a time": b"train: {steps: 1:30}\n",
    "octal": b"train: {steps: 010}\n",
    "a backtick": b"train: {steps: `3`}\n",
    "interpolation": b"run: {dir: '${oc.env:HOME}'}\n",
    "a wrong interpolation": b"run: {dir: '${'}\n",
    "JSON that is cut": b'{"train": {"steps": 3',
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
    "a zip": b"PK\x03\x04" + bytes(range(256)) * 4,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}


def yaml_cases(rng: random.Random) -> Iterator[Case]:
    """Each of FILES as a configuration, for several commands."""
    for fault, content in FILES.items():
        for command in ("train", "plan"):
            arguments = (command, "tiny.yaml", "bad.yaml")
            yield Case(f"YAML: {fault}", arguments, ("bad.yaml",), {"bad.yaml": content}, refused=fault != "null")
    yield Case("YAML: a directory", ("train", "bad.yaml"), ("bad.yaml",), {"bad.yaml/x": b""})
    yield Case("YAML: missing", ("train", "bad.yaml"), ("bad.yaml",))
    yield Case("YAML: a pipe", ("train", "bad.yaml"), ("bad.yaml",), prepare=lambda cwd: _pipe(cwd / "bad.yaml"))
    zero = lambda cwd: (cwd / "bad.yaml").symlink_to("/dev/zero")  # noqa: E731
    yield Case("YAML: without end", ("train", "bad.yaml"), ("bad.yaml",), prepare=zero)


def _pipe(path) -> None:
    import os

    os.mkfifo(path)


def random_yaml_cases(rng: random.Random) -> Iterator[Case]:
    """The tiny configuration with bytes changed by chance."""
    while True:
        content = bytearray(TINY.encode())
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(content))
            match rng.randrange(4):
                case 0:
                    content[place] = rng.randrange(256)
                case 1:
                    del content[place]
                case 2:
                    content[place:place] = rng.choice(b"[]{}:,&*!|>'\"%@`-?#\t\n\0 ~.0").to_bytes(1, "little")
                case 3:
                    content[place:place] = bytes(content[place : place + rng.randrange(20)])
        yield Case("YAML: by chance", ("train", "bad.yaml"), ("",), {"bad.yaml": bytes(content)}, refused=False)
