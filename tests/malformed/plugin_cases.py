"""Plugins that cannot be imported, or register what cannot be."""

import random
from collections.abc import Iterator

from tests.malformed.case import Case
from tests.malformed.data_cases import PLACES, at

SCHEME = """import hybridnorm_jax as hn
half = hn.SublayerPlacement(pre=True{})
@hn.scheme('mine')
def mine(layer, n):
    {}
"""
NORM = """import hybridnorm_jax as hn
import jax.numpy as jnp
@hn.norm_kind({})
def mine(x{}):
    {}
"""
# With model.norm=mine; of most the registration fails, of some the first tracing of a model.
NORMS = {
    "a name that exists": NORM.format("'dyt'", "", "return x"),
    "no name": NORM.format("None", "", "return x"),
    "another shape": NORM.format("'mine'", "", "return x[..., :1]"),
    "another shape in a model alone": NORM.format("'mine'", "", "return x if x.shape[:2] == (2, 3) else x[..., :1]"),
    "another dtype": NORM.format("'mine'", "", "return x.astype(jnp.bfloat16)"),
    "no array": NORM.format("'mine'", "", "return 1.0"),
    "nothing": NORM.format("'mine'", "", "pass"),
    "raises": NORM.format("'mine'", "", "1 / 0"),
    "raises two lines": NORM.format("'mine'", "", "raise ValueError('a\\nb')"),
    "raises in a model alone": NORM.format("'mine'", "", "return x if x.shape[:2] == (2, 3) else 1 / 0"),
    "one argument too many": NORM.format("'mine'", ", y", "return x"),
    "no argument": NORM.replace("(x{})", "()").format("'mine'", "return 1"),
    "parameters that are none": NORM.format("'mine', parameters=[1]", "", "return x"),
    "parameters that are no list": NORM.format("'mine', parameters=hn.NormParameter('a')", ", a", "return x"),
    "a parameter named scale": NORM.format("'mine', parameters=[hn.NormParameter('scale')]", ", scale", "return x"),
    "an infinite start": NORM.format("'mine', parameters=[hn.NormParameter('a', start=1e999)]", ", a", "return x"),
    "a start of text": NORM.format("'mine', parameters=[hn.NormParameter('a', start='1')]", ", a", "return x"),
    "a shape of three": NORM.format("'mine', parameters=[hn.NormParameter('a', (1, 2, 3))]", ", a", "return x"),
    "a class": "import hybridnorm_jax as hn\nhn.norm_kind('mine')(int)\n",
    "no function": "import hybridnorm_jax as hn\nhn.norm_kind('mine')(3)\n",
}
PLUGINS = {
    "no Python": b"def",
    "a tab and spaces": b"if 1:\n\tx = 1\n        y = 2\n",
    "raises": b"1 / 0",
    "raises two lines": b"raise ValueError('one\\ntwo\\r\\nthree')",
    "raises nothing": b"raise ValueError",
    "raises a long text": b"raise ValueError('x' * 10**6)",
    "raises with an object's text that fails": b"class E(Exception):\n  def __str__(self): raise E\nraise E\n",
    "exits": b"import sys; sys.exit(0)",
    "exits with a text": b"raise SystemExit('done')",
    "exits with 7": b"raise SystemExit(7)",
    "raises BaseException": b"raise BaseException('x')",
    "raises GeneratorExit": b"raise GeneratorExit",
    "recurses": b"def f(): f()\nf()",
    "no module": b"import no_such_module_anywhere",
    "no name": b"from os import no_such_name",
    "NUL": b"x = 1\0",
    "latin-1": "x = '\xe9'".encode("latin-1"),
    "an encoding of no kind": b"# coding: nothing\nx = 1",
    "deep": b"(" * 5000 + b")" * 5000,
    "a long number": b"x = " + b"9" * 5000,
    "a name that exists": b"import hybridnorm_jax as hn\nhn.scheme('pre')(lambda layer, n: None)",
    "an unknown argument": b"import hybridnorm_jax as hn\n@hn.scheme('mine', nothing=1)\ndef f(layer, n): pass",
    "returns nothing": SCHEME.format("", "pass").encode(),
    "returns another thing": SCHEME.format("", "return half").encode(),
    "a scheme raises": SCHEME.format("", "1 / 0").encode(),
    "a scheme raises two lines": SCHEME.format("", "raise ValueError('a\\nb')").encode(),
    "a scheme takes one argument": SCHEME.format("", "return hn.BlockPlacement(half, half)")
    .replace(", n", "")
    .encode(),
    "an infinite scale": SCHEME.format(
        ", residual_scale=float('inf')", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a scale that is no number": SCHEME.format(
        ", branch_scale=float('nan')", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a scale of text": SCHEME.format(", input_scale='1'", "return hn.BlockPlacement(half, half)").encode(),
    "an infinite start": SCHEME.format(
        ", branch=True, branch_norm_init=1e999", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a wrong residual": SCHEME.format(", residual='x'", "return hn.BlockPlacement(half, half)").encode(),
    "a list as residual": SCHEME.format(", residual=[]", "return hn.BlockPlacement(half, half)").encode(),
    "no initializer": SCHEME.replace("'mine'", "'mine', initializer='x'")
    .format("", "return hn.BlockPlacement(half, half)")
    .encode(),
}


def plugin_cases(rng: random.Random) -> Iterator[Case]:
    """Each wrong plugin, for the commands that import some."""
    for fault, content in PLUGINS.items():
        for command in (("train", "tiny.yaml"), ("plan", "tiny.yaml", "--topology=gpu:1x80GB")):
            arguments = (*command, "run.plugins=[bad.py]", "model.scheme=mine")
            yield Case(f"plugin: {fault}", arguments, ("bad.py", "mine", "model.scheme"), {"bad.py": content})
    for fault, source in NORMS.items():
        commands = [("train", "tiny.yaml"), ("plan", "tiny.yaml", "--topology=gpu:1x80GB")]
        # A plan makes its devices before it traces the model, which counts as taken here.
        for command in commands[:1] if "in a model alone" in fault else commands:
            arguments, names = (*command, "run.plugins=[bad.py]", "model.norm=mine"), ("bad.py", "mine", "model.norm")
            yield Case(f"plugin: norm: {fault}", arguments, names, {"bad.py": source.encode()})
    for fault, prepare in PLACES.items():
        arguments = ("train", "tiny.yaml", "run.plugins=[bad.py]")
        yield Case(f"plugin: {fault}", arguments, ("bad.py",), prepare=at("bad.py", prepare))
    for plugin in (
        "nowhere.py",
        "no_such_module",
        "a.b.c",
        "''",
        "..",
        "a b",
        "'.py'",
        "__main__x",
        "json.nothing",
        "'a\\0b.py'",
    ):
        arguments = ("train", "tiny.yaml", f'run.plugins=["{plugin}"]' if "\\" in plugin else f"run.plugins=[{plugin}]")
        yield Case("plugin: no such", arguments, ("run.plugins",))
