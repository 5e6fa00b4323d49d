"""Draws layers.svg, the picture of the packages: python docs/pictures/layers.py.

The layers are read from the import contract in pyproject.toml, so the picture cannot differ from what is checked. One
file serves light and dark pages: it asks the reader's system which of them is wanted.
"""

import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEANING = {
    "__main__": "python -m hybridnorm_jax",
    "commands": "the program hybridnorm, a file for each subcommand",
    "lab": "compare placements, report",
    "planning": "does a run fit on a slice",
    "training": "state, optimizer, step, loop and hooks, checkpoints",
    "evaluation": "loss and perplexity",
    "generation": "sampling text",
    "data": "text and tokens to batches",
    "config": "RunConfig, YAML, key=value",
    "equivalence": "cheaper Pre-LN forms",
    "interop": "Hugging Face, OLMo",
    "nnx": "modules for NNX",
    "model": "placements, the formula, norms, attention, decoder, loss",
    "kernels": "who computes attention and experts",
    "mesh": "axes, sharding rules, processes",
    "config_fields": "keys with checks",
    "append_only": "files that only grow",
    "loggers": "TensorBoard, CSV, W&amp;B, MLflow",
    "file_formats": "what a file is",
    "streams": "output that may end",
    "whole_files": "files, whole or not",
    "errors": "errors that a user can mend",
}
WIDTH, ROW, GAP, MARGIN = 520, 44, 8, 8
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1f2328; }
  .name { font-weight: 600; }
  .meaning { fill: #57606a; font-size: 12.5px; }
  rect { fill: #f6f8fa; stroke: #8c959f; }
  path { stroke: #57606a; fill: none; }
  .head { fill: #57606a; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .meaning { fill: #9aa4af; } rect { fill: #21262d; stroke: #6e7681; }
    path { stroke: #9aa4af; } .head { fill: #9aa4af; }
  }
"""


def layers() -> list[list[str]]:
    """The layers of the import contract, top first; packages of one layer do not import each other."""
    settings = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())
    contract = settings["tool"]["importlinter"]["contracts"][0]  # that of the whole package; others are of one folder
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def box(name: str, left: float, top: float, width: float) -> str:
    """One package: its name and what lives there."""
    middle = left + width / 2
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="{ROW}" rx="6"/>'
        f'<text class="name" x="{middle}" y="{top + 18}" text-anchor="middle">{name}</text>'
        f'<text class="meaning" x="{middle}" y="{top + 35}" text-anchor="middle">{MEANING[name]}</text>'
    )


def drawing() -> str:
    """The whole picture as SVG."""
    rows = layers()
    height = 2 * MARGIN + len(rows) * (ROW + GAP) - GAP
    parts, inner = [], WIDTH - 3 * MARGIN - 32
    for number, names in enumerate(rows):
        width = (inner - GAP * (len(names) - 1)) / len(names)
        top = MARGIN + number * (ROW + GAP)
        parts += [box(name, MARGIN + place * (width + GAP), top, width) for place, name in enumerate(names)]
    x, bottom = WIDTH - MARGIN - 12, height - MARGIN
    parts.append(f'<path d="M{x} {MARGIN} V{bottom - 8}" stroke-width="2"/>')
    parts.append(f'<path class="head" d="M{x - 6} {bottom - 10} h12 l-6 10 z"/>')
    label = f'<text class="meaning" transform="translate({x - 8} {height / 2}) rotate(-90)" text-anchor="middle">'
    parts.append(f"{label}imports go down only</text>")
    title = "The packages of hybridnorm_jax in layers; each may import from the layers below it"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "layers.svg").write_text(drawing())
