"""What follows the width where model.base_width is set: the maximal update parametrization (muP).

Yang et al. 2022, "Tensor Programs V" (2203.03466), table 8 and, for a head of its own, the equivalent table 3. With
m = width / base_width a parameter of each kind has

    kind     what it is                                              initial std    rate of Adam
    input    tables of tokens and positions                          1              1
    hidden   matrices from the width to what grows with it           1 / sqrt(m)    1 / m
    output   matrices from the width to what does not grow:          1 / m          1 / m
             the head, the router, the gate of shared experts
    vector   biases, scales and other numbers of norms and branches  1              1

times what it has at the base width. A table that is also the head is of the kind "input", and the logits are divided by
m (model.logit_scale). At the base width nothing changes.

Biases and vectors start where they always do. A hidden matrix from mlp_dim or from the heads has the factor of the
width too: these sizes are to grow in proportion to it.
"""

import math
from typing import Literal

Kind = Literal["input", "hidden", "output", "vector"]

# Of each module with a kernel inside a Decoder.
KERNELS: dict[str, Kind] = {
    "query": "hidden",
    "key": "hidden",
    "value": "hidden",
    "out": "hidden",
    "gate": "hidden",
    "up": "hidden",
    "down": "hidden",
    "expert_gate": "hidden",
    "expert_up": "hidden",
    "expert_down": "hidden",
    "router": "output",
    "shared_gate": "output",
    "head": "output",
}


def kind_of(path: tuple[str, ...]) -> Kind:
    """The kind of the parameter at this path of a Decoder's tree.

    Raises:
      KeyError: a kernel that KERNELS does not name.
    """
    *modules, name = path
    if name == "embedding":
        return "input"
    return KERNELS[modules[-1]] if name == "kernel" else "vector"


def std_for_width(kind: Kind, ratio: float) -> float:
    """What the initial standard deviation at the base width is multiplied with; ratio = m."""
    return {"input": 1.0, "hidden": 1 / math.sqrt(ratio), "output": 1 / ratio}[kind]


def rate_for_width(kind: Kind, ratio: float) -> float:
    """What the learning rate at the base width is multiplied with, for Adam and others that follow signs."""
    return 1 / ratio if kind in ("hidden", "output") else 1.0
