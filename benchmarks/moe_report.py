"""The result of moe.py as tables for people."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from command_line import aligned, machine_line, number_text
from moe_layers import FEED_FORWARD

DENSE_MODEL = "dense_model"
TITLES = {FEED_FORWARD: "dense FeedForward", DENSE_MODEL: "dense model"}


class Mode(NamedTuple):
    """What a layer does.

    Attributes:
      flops: for each weight and token.
    """

    title: str
    flops: int


MODES = {"forward": Mode("forward", flops=2), "forward_backward": Mode("both", flops=6)}


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [f"{machine_line(result)}, {result['rounds']} rounds"]
    for layer in result["layers"]:
        lines += ["", *_layer_lines(layer)]
    if result["step"] is not None:
        lines += ["", *_step_lines(result["step"])]
    return "\n".join(lines)


def _layer_lines(layer: Mapping[str, Any]) -> list[str]:
    sizes = (
        f"embed {layer['embed']}, mlp {layer['mlp']}, {layer['experts']} experts, top {layer['k']}, "
        f"{layer['shared']} shared, {layer['dtype']}"
    )
    groups = f"{layer['empty_experts']} empty, the largest {layer['largest_group_over_mean']:.2f} of the mean"
    rows = {}
    for name, mode in MODES.items():
        for contestant, row in layer[name].items():
            rows[f"{mode.title} {TITLES.get(contestant, contestant)}"] = row
    return [
        f"layer, {layer['tokens']} tokens, {sizes}; {layer['routing']} choice: {groups}",
        *table(rows, layer["left_out"]),
    ]


def _step_lines(step: Mapping[str, Any]) -> list[str]:
    model = step["model"]
    sizes = (
        f"{model['num_layers']} layers, embed {model['d_model']}, mlp {model['mlp_dim']}, {model['num_experts']} "
        f"experts, top {model['experts_per_token']}, {model['shared_experts']} shared, {model['dtype']}"
    )
    mesh = ", ".join(f"{axis} {size}" for axis, size in step["mesh"].items() if size > 1) or "one device"
    rows = {TITLES.get(name, name): row for name, row in step["train_step"].items()}
    return [f"training step, {step['tokens']} tokens, {sizes}; mesh: {mesh}", *table(rows, step["left_out"])]


def table(rows: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str]) -> list[str]:
    """Lines of one table, and of what it lacks."""
    cells = [_cells(title, row) for title, row in rows.items()]
    lines = aligned([list(cells[0]), *(list(of_row.values()) for of_row in cells)]) if cells else []
    return lines + [f"  left out: {name}: {reason}" for name, reason in left_out.items()]


def _cells(title: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Heading of a column -> cell."""
    shortest, longest = (number_text(1e3 * seconds) for seconds in row["seconds_quartiles"])
    least, most = row["ratio_quartiles"]
    cells = {
        "": title,
        "ms (quartiles)": f"{number_text(1e3 * row['seconds'])} ({shortest}-{longest})",
        f"/ {row['base']}": f"{row['ratio']:.3g} ({least:.3g}-{most:.3g})",
        "tokens/s": number_text(row["tokens_per_second"]),
        "GFLOP/s": number_text(row["flops_per_second"] / 1e9),
        "of peak": "unknown" if row["peak_fraction"] is None else f"{row['peak_fraction']:.3f}",
        "temporaries MB": number_text(row["temporaries_mb"]),
    }
    if "off_by" in row:
        off_by = {part: f"{value:.1e}" for part, value in row["off_by"].items()}
        cells["result off by"] = off_by.pop("y", "")
        cells["gradients off by"] = "  ".join(f"{part} {text}" for part, text in off_by.items())
    else:
        cells["arguments MB"] = number_text(row["arguments_mb"])
        cells["compile s"] = number_text(row["compile_seconds"])
        cells["parameters, M"] = number_text(row["parameters"] / 1e6)
    return cells
