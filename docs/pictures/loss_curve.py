"""Draws the loss curve of a run, in a light and a dark version: python docs/pictures/loss_curve.py RUN_DIR OUT_PREFIX.

docs/pictures/quickstart-light.svg and -dark.svg come from the run of `make train`:

    python docs/pictures/loss_curve.py runs/quickstart docs/pictures/quickstart
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from hybridnorm_jax.training.metrics_file import read_records

SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "hybridnorm", "font.size": 11, "font.family": "DejaVu Sans"}
COLORS = {
    "light": {"text": "#1f2328", "grid": "#d0d7de", "train": "#3b6fb6", "eval": "#b3421f"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "train": "#79b0f2", "eval": "#ff9d76"},
}


def read(directory: Path) -> tuple[list[float], dict[int, float]]:
    """The training loss of every step, and the held-out loss by step."""
    losses: list[float] = []
    held_out = {}
    for record in read_records(directory):
        losses += record.get("train/losses", [])
        if "eval/validation/loss" in record:
            held_out[record["step"]] = record["eval/validation/loss"]
    return losses, held_out


def draw(losses: list[float], held_out: dict[int, float], colors: dict[str, str], file: Path) -> None:
    """One figure on a transparent ground."""
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=colors["train"], linewidth=1, label="training loss, every step")
    axes.plot(list(held_out), list(held_out.values()), "o", color=colors["eval"], markersize=7, label="held-out loss")
    for step, loss in held_out.items():
        axes.annotate(
            f"{loss:.2f}", (step, loss), (0, 26), textcoords="offset points", ha="center", color=colors["eval"]
        )
    axes.set_xlabel("step (2,048 bytes each)")
    axes.set_ylabel("nats per byte")
    axes.set_xlim(0, len(losses) * 1.02)
    axes.grid(color=colors["grid"], linewidth=0.6)
    axes.tick_params(colors=colors["text"])
    for spine in axes.spines.values():
        spine.set_color(colors["grid"])
    axes.xaxis.label.set_color(colors["text"])
    axes.yaxis.label.set_color(colors["text"])
    axes.legend(frameon=False, labelcolor=colors["text"])
    figure.savefig(file, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def main(run: str, prefix: str) -> None:
    """Draw both versions."""
    losses, held_out = read(Path(run))
    with matplotlib.rc_context(SETTINGS):
        for name, colors in COLORS.items():
            draw(losses, held_out, colors, Path(f"{prefix}-{name}.svg"))


if __name__ == "__main__":
    main(*sys.argv[1:])
