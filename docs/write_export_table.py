"""Writes the table of using_a_model.md beside this file: which schemes export as an architecture of transformers.

    python docs/write_export_table.py

A test compares the page with what this writes.
"""

from pathlib import Path

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ALL, config_to_json

PAGE = Path(__file__).with_name("using_a_model.md")
BEGIN, END = "<!-- Written by docs/write_export_table.py -->\n", "<!-- until here -->\n"

SIZES = {"d_model": 64, "num_layers": 8, "num_heads": 4, "vocab_size": 256}
BIASES = {"norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True, "activation": "gelu_tanh"}
LEARNED = {"positions": "learned", "max_positions": 64}
# What else of a model decides: the columns of the table, and of each the models that stand for it.
KINDS = {
    "RMSNorm, SwiGLU, RoPE": [{}],
    "the same with experts": [{"num_experts": 4, "experts_per_token": 2}],
    "LayerNorm and biases, learned positions": [
        {**BIASES, **LEARNED},
        {**BIASES, **LEARNED, "position_offset": 2, "activation": "relu"},
    ],
    "LayerNorm and biases, RoPE": [{**BIASES}],
}


def is_there(scheme: str, kind: str) -> bool:
    """Whether there are such models: experts have no norms and no scales inside."""
    has_experts = any("num_experts" in keys for keys in KINDS[kind])
    placements = hn.SCHEMES[scheme].placements(SIZES["num_layers"])
    return not has_experts or not any(placement.normalizes_hidden or placement.sphere for placement in placements)


def classes(scheme: str, kind: str) -> list[str]:
    """The classes of transformers by which models of this scheme and kind are written; [] for our own code.

    It is [] where there are no such models, too. Where branches grow with the training step, they have grown.
    """
    if not is_there(scheme, kind):
        return []
    configs = [hn.ModelConfig(**SIZES, scheme=scheme, **keys) for keys in KINDS[kind]]
    names = [config_to_json(config.at_step(config.ramp_length))[0] for config in configs]
    return [ALL[name].class_name for name in dict.fromkeys(names) if name != "hybridnorm"]


def cell(scheme: str, kind: str) -> str:
    """The classes of `classes` as text, a dash where there is no such model."""
    if not is_there(scheme, kind):
        return "-"
    return ", ".join(f"`{name}`" for name in classes(scheme, kind)) or "own code"


def table() -> str:
    """The table, and the schemes that are in none of its rows."""
    lines = [f"| scheme | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    own = []
    for scheme in hn.SCHEMES:
        cells = [cell(scheme, kind) for kind in KINDS]
        if set(cells) <= {"own code", "-"}:
            own.append(f"`{scheme}`")
        else:
            lines.append(f"| `{scheme}` | {' | '.join(cells)} |")
    lines.append(f"| all {len(own)} others | own code{' | own code' * (len(KINDS) - 1)} |")
    others = f"The others are {', '.join(own)}, and every scheme of a file of yours."
    others += " `prores_*` and `branch_norm` are in own code until all of their branches have grown."
    return "\n".join(lines) + f"\n\n{others}\n"


def page() -> str:
    """The page with this table in its place."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
