"""Writes schemes.md beside this file, and the pictures in pictures/schemes: every scheme of the table.

    python docs/write_schemes.py

The page's results are those that `python -m tests.scheme_checks` keeps in results/schemes.json. A test compares the
page and the pictures with what this writes.
"""

import functools
import importlib.util
import inspect
import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hybridnorm_jax as hn

PAGE = Path(__file__).with_name("schemes.md")
RESULTS = Path(__file__).with_name("results") / "schemes.json"
LETTERS = ("qk", "kv", "qkv", "qkc", "kc", "qkvc")
FORMS = ("{}_post", "{}_pre", "pre_{}_post", "pre_{}_pre")


class Family(NamedTuple):
    """Schemes that stand together on the page."""

    title: str
    text: str
    names: tuple[str, ...]


FAMILIES = (
    Family(
        "Norms in front of the branches",
        "The stream itself is never normalized before the last block, so that its size grows with depth.",
        ("pre", "pre_qk_projection", "layernorm_scaling", "layernorm_scaling_learned"),
    ),
    Family(
        "Norms behind the sums",
        "The stream is normalized in every block. Most of these strengthen the residual, or take it from further back.",
        (
            *("post", "post_final_norm", "mix_ln", "mix_ln_12", "mix_ln_50", "deepnorm", "deepnorm_final_norm"),
            *("deepnorm_pre", "b2t", "span", "keel", "keel_pre_first"),
        ),
    ),
    Family(
        "HybridNorm",
        "Attention normalizes its queries, keys and values; the block has one norm behind attention's sum.",
        (
            *("hybrid", "hybrid_star", "hybrid_output_norm", "hybrid_depth_scaled", "hybrid_layer_scale"),
            *("hybrid_rezero", "hybrid_skipinit", "pre_post", "post_pre"),
        ),
    ),
    Family(
        "Norms on what a branch adds",
        "A norm stands behind the branch and before the sum.",
        ("sandwich", "sandwich_qk", "peri", "peri_no_final_norm", "peri_bare", "reordered"),
    ),
    Family(
        "Parallel branches",
        "Attention and the feed-forward layer read the same input.",
        ("parallel", "parallel_one_norm", "parallel_qk", "parallel_one_norm_qk"),
    ),
    Family(
        "Norms within the branches",
        "Norms stand in front of the last matrix of a branch, or behind every matrix.",
        ("sub_ln", "normformer", "normformer_before", "normformer_residual", "simple_norm"),
    ),
    Family(
        "Two streams",
        "A side stream `s` gets what every branch adds, and is not normalized on its way.",
        ("siamese_hybrid_pre", "siamese_attn_norm", "siamese_post_pre", "residual"),
    ),
    Family(
        "Branches that grow with the training step",
        "What a branch adds is times a share `t`, which grows from 0 to 1 while the model trains (`model.ramp_steps`).",
        ("prores_pre", "prores_post", "prores_sandwich", "prores_deepnorm", "branch_norm"),
    ),
    Family(
        "Steps in the place of sums",
        "The branch says in which direction the stream turns.",
        ("ngpt", "geonorm"),
    ),
    Family(
        "The ablations of HybridNorm",
        "Four forms of the block, with six choices of what attention normalizes per head; `c` is the context. "
        "A leading `pre` is a norm in front of attention, a final `pre` one in front of the feed-forward layer, and a "
        "final `post` one behind attention's sum.",
        tuple(form.format(letters) for form in FORMS for letters in LETTERS),
    ),
)

# What is known of divergence, with the place; nothing is said of schemes that are not here.
_AT_1B = "in a comparison that others report, of 1.3B parameters and 100 billion tokens"
DIVERGES = {
    "post": "with 29 layers and 543M parameters, in HybridNorm's experiments (2503.04598)",
    "qk_post": "with 550M parameters, in the ablation of HybridNorm's appendix G (2503.04598)",
    "hybrid": f"at peak learning rates of 1e-3 and 2e-3 {_AT_1B}. In ours a small model stops learning at 1.6e-2 "
    "([Results](results.md#3-learning-rates))",
    "hybrid_depth_scaled": "in our small model it stops learning at 6.4e-2 ([Results](results.md#3-learning-rates))",
    "span": f"at a peak learning rate of 2e-3 {_AT_1B}",
}

LAST_LINES = re.compile(r"^  (model|source|checked): (.*)", re.MULTILINE)
BEGIN, END = "<!-- {} is written by docs/write_schemes.py -->\n", "<!-- until here -->\n"


@functools.cache
def _script(name: str) -> ModuleType:
    """A script of this folder."""
    spec = importlib.util.spec_from_file_location(Path(name).name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures() -> ModuleType:
    """docs/pictures/blocks.py."""
    return _script("pictures/blocks")


def entry(name: str, depth: int, row: dict[str, Any]) -> str:
    """One scheme, folded: equations in the middle of the model, picture, text, results."""
    scheme = hn.SCHEMES[name]
    middle = scheme.placements(depth)[depth // 2]
    equations = f"{middle.attention.formula('Attn')}; {middle.feed_forward.formula('FFN')}"
    lines = [
        f'<details markdown="1" id="{name}"><summary><code>{name}</code> {escape(equations)}</summary>',
        "",
        *([inspect.cleandoc(scheme.block.__doc__), ""] if scheme.block.__doc__ else []),
        f"![A block of {name}](pictures/schemes/{name}.svg)",
        "",
        # Of the table its last lines: what stands around the blocks, the source, and who checked it.
        *(f"- {key.capitalize()}: {words}" for key, words in LAST_LINES.findall(scheme.table(depth))),
        f"- Reproduces: {golden_words(row['golden'])}",
        f"- Converts: {convert_words(row['convert'])}",
        f"- Exports: {export_words(name)}",
    ]
    if name in DIVERGES:
        lines.append(f"- Known to diverge: {DIVERGES[name]}")
    return "\n".join([*lines, "", "</details>"])


def exported_as(name: str) -> list[str]:
    """The classes of transformers as which some models of a scheme are written; write_export_table.py says which."""
    script = _script("write_export_table")
    return list(dict.fromkeys(each for kind in script.KINDS for each in script.classes(name, kind)))


def export_words(name: str) -> str:
    """As what a scheme's models are written for PyTorch."""
    classes = ", ".join(f"`{each}`" for each in exported_as(name))
    return f"as our own PyTorch code, and some models as {classes}" if classes else "as our own PyTorch code"


def golden_words(goldens: list[str]) -> str:
    """Golden tensors by name; those of transformers counted where they are many."""
    own = [f"`{name}`" for name in goldens if not name.startswith("transformers ")]
    others = [f"`{name.removeprefix('transformers ')}`" for name in goldens if name.startswith("transformers ")]
    if others:
        own.append(f"{len(others)} models of transformers" if len(others) > 3 else f"transformers' {', '.join(others)}")
    return ", ".join(own) or "none; the equation only"


def convert_words(convert: str) -> str:
    """Whether it converts, or what keeps it."""
    return "yes" if convert == "yes" else f"no, {convert}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results of all checks, a row for each scheme."""
    lines = [
        "| scheme | golden tensors | gradient | generation | export | converts |",
        "|---|---|---|---|---|---|",
    ]
    for name in hn.SCHEMES:
        row = rows[name]
        numbers = f"{row['gradients']['gradient']:.0e} | {row['generation']} | {row['export']:.0e}"
        lines.append(
            f"| [`{name}`](#{name}) | {golden_words(row['golden'])} | {numbers} | {convert_words(row['convert'])} |"
        )
    return "\n".join(lines)


def runs(rows: dict[str, dict[str, Any]]) -> str:
    """When and where the rows were made."""
    counted = Counter((row["date"], row["machine"]) for row in rows.values())
    words = [f"{number} schemes on {date} on {machine}" for (date, machine), number in sorted(counted.items())]
    return f"Run: {'; '.join(words)}."


def families(rows: dict[str, dict[str, Any]]) -> str:
    """All schemes, family by family."""
    depth = pictures().DEPTH
    parts = []
    for family in FAMILIES:
        parts += [f"## {family.title}", family.text, *(entry(name, depth, rows[name]) for name in family.names)]
    return "\n\n".join(parts) + "\n"


def page() -> str:
    """The page with both parts in their places."""
    rows = json.loads(RESULTS.read_text())
    text = PAGE.read_text()
    for what, written in (("This part", families(rows)), ("This table", f"{runs(rows)}\n\n{table(rows)}\n")):
        before, found, rest = text.partition(BEGIN.format(what))
        assert found, f"{PAGE}: has lost the line {BEGIN.format(what)!r}"
        text = before + found + "\n" + written + "\n" + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    pictures().write()
    PAGE.write_text(page())
