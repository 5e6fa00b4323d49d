"""Parameters shaped as a decoder's, and gradients by a formula: what optimizers are compared on.

Layers and experts are stacked, heads lie side by side, and kernels are wide, tall and square.
"""

import numpy as np

STEPS = 20
LAYERS, EXPERTS, EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 2, 3, 6, 2, 4, 10, 7
SHAPES = {
    "token_embedding/embedding": (VOCAB, EMBED),
    "run_0/attention/query/kernel": (LAYERS, EMBED, HEADS, HEAD_DIM),
    "run_0/attention/out/kernel": (LAYERS, HEADS, HEAD_DIM, EMBED),
    "run_0/attention/query/bias": (LAYERS, HEADS, HEAD_DIM),
    "run_0/feed_forward/up/kernel": (LAYERS, EMBED, MLP),
    "run_0/feed_forward/down/kernel": (LAYERS, MLP, EMBED),
    "run_0/moe/expert_up/kernel": (LAYERS, EXPERTS, EMBED, MLP),
    "run_0/moe/expert_down/kernel": (LAYERS, EXPERTS, MLP, EMBED),
    "run_0/attention_pre_norm/scale": (LAYERS, EMBED),
    "final_norm/scale": (EMBED,),
    "head/kernel": (EMBED, VOCAB),
}


def start():
    """Path -> the parameters before the first step, in float64."""
    return {path: 0.5 * np.cos(_count(shape) + number) for number, (path, shape) in enumerate(SHAPES.items())}


def gradient(path, parameter, step):
    """The gradient of step 0, 1, ..., which depends on the parameter, so that a wrong step shows in all later ones."""
    number = list(SHAPES).index(path)
    return 0.1 * parameter + np.sin((1 + _count(parameter.shape)) * (step + 1.5) + number)


def _count(shape):
    return np.arange(np.prod(shape), dtype=float).reshape(shape)


def single(path):
    """The indices of the single matrices or vectors of a parameter: one for each layer and expert."""
    shape = SHAPES[path]
    if not path.startswith("run_"):
        return [()]
    leading = shape[: 2 if "expert_" in path else 1]
    return list(np.ndindex(leading))


def as_matrix(path, array):
    """One matrix as PyTorch's Linear holds it, (outputs, inputs); vectors as one axis."""
    if not path.endswith(("kernel", "embedding")):
        return array.reshape(-1)
    inputs = HEADS * HEAD_DIM if "/out/" in path else array.shape[0]
    return array.reshape(inputs, -1).T


def from_matrix(path, matrix, shape):
    """The opposite of as_matrix."""
    return (matrix.T if matrix.ndim == 2 else matrix).reshape(shape)


def nested(flat):
    """{"a/b": x} as {"a": {"b": x}}."""
    tree = {}
    for path, value in flat.items():
        *modules, name = path.split("/")
        inside = tree
        for module in modules:
            inside = inside.setdefault(module, {})
        inside[name] = value
    return tree
