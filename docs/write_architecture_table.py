"""Writes the tables of architectures in README.md and in architectures.md beside this file.

    python docs/write_architecture_table.py

A test compares the pages with what this writes.
"""

from pathlib import Path

from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json
from hybridnorm_jax.interop.hf_architecture import Architecture

PAGE = Path(__file__).with_name("architectures.md")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- Written by docs/write_architecture_table.py -->\n", "<!-- until here -->\n"


def is_pre_layernorm(architecture: Architecture) -> bool:
    """Whether a model of its default config.json has LayerNorm at the entrance of every branch, and nowhere else."""
    config = config_from_json({"model_type": architecture.name}, "config.json")[1]
    branches = [branch for block in config.placements for branch in (block.attention, block.feed_forward)]
    return config.norm == "layernorm" and all(each.pre and not each.branch and not each.post for each in branches)


def short_table() -> str:
    """Names alone, for README.md."""
    pre = [f"`{each.name}`" for each in ARCHITECTURES.values() if is_pre_layernorm(each)]
    others = [f"`{each.name}`" for each in ARCHITECTURES.values() if not is_pre_layernorm(each)]
    lines = [f"| Read and written | {len(ARCHITECTURES)} architectures of transformers |", "|---|---|"]
    lines += [f"| Pre-LN | {', '.join(pre)} |", f"| others | {', '.join(others)} |"]
    return "\n".join(lines) + "\n"


def table() -> str:
    """A row for each architecture, for the page."""
    lines = ["| `model_type` | class | | Pre-LN |", "|---|---|---|---|"]
    for each in ARCHITECTURES.values():
        placement = "yes" if is_pre_layernorm(each) else "no"
        lines.append(f"| `{each.name}` | `{each.class_name}` | {each.summary} | {placement} |")
    return "\n".join(lines) + "\n"


def with_table(page: Path, written: str) -> str:
    """The page with this table in its place."""
    before, _, rest = page.read_text().partition(BEGIN)
    return before + BEGIN + written + END + rest.partition(END)[2]


PAGES = {README: short_table, PAGE: table}

if __name__ == "__main__":
    for path, write in PAGES.items():
        path.write_text(with_table(path, write()))
