"""Makes the goldens of optimizers with PyTorch's and the authors' implementations, in float64.

    pip install torch==2.13 lion-pytorch==0.2.5 schedulefree==1.4.1
    PYTHONPATH=tests python tests/goldens/optimizers/make.py

NAME.npz holds, for each parameter of optimizer_problem.py, its values after 20 steps: `param/PATH`, and of
schedule-free `average/PATH`, the parameters that are to be evaluated. Every layer's and expert's matrix is a parameter
of its own here, (outputs, inputs) as in torch.nn.Linear.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import optimizer_problem as problem
import torch
from lion_pytorch import Lion
from schedulefree.adamw_schedulefree_reference import AdamWScheduleFreeReference

ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}


def is_muons(path):
    return path.startswith("run_") and path.endswith("kernel")


def muon(convention):
    def make(named):
        matrices = [tensor for path, tensor in named if is_muons(path)]
        others = [tensor for path, tensor in named if not is_muons(path)]
        of_muon = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": convention}
        return [torch.optim.Muon(matrices, **of_muon), torch.optim.AdamW(others, **ADAM)]

    return make


# Below 1 / sqrt(20) PyTorch's Adafactor has the rate that it is given.
ADAFACTOR = {"lr": 0.1, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.3}
CASES = {
    "adamw": lambda named: [torch.optim.AdamW([tensor for _, tensor in named], **ADAM)],
    "adafactor": lambda named: [torch.optim.Adafactor([tensor for _, tensor in named], **ADAFACTOR)],
    "lion": lambda named: [Lion([tensor for _, tensor in named], lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)],
    "muon_original": muon("original"),
    "muon_match_rms_adamw": muon("match_rms_adamw"),
    "schedule_free": lambda named: [
        AdamWScheduleFreeReference([tensor for _, tensor in named], warmup_steps=4, **ADAM)
    ],
}


def trained(make):
    """(parameters after all steps, those to be evaluated), by path."""
    arrays = problem.start()
    pieces = [(path, index) for path in arrays for index in problem.single(path)]
    tensors = [torch.tensor(problem.as_matrix(path, arrays[path][index]).copy()) for path, index in pieces]
    for tensor in tensors:
        tensor.requires_grad_()
    optimizers = make([(path, tensor) for (path, _), tensor in zip(pieces, tensors, strict=True)])

    def values():
        for (path, index), tensor in zip(pieces, tensors, strict=True):
            arrays[path][index] = problem.from_matrix(path, tensor.detach().numpy(), arrays[path][index].shape)
        return {path: array.copy() for path, array in arrays.items()}

    for optimizer in optimizers:
        getattr(optimizer, "train", lambda: None)()
    for step in range(problem.STEPS):
        gradients = {path: problem.gradient(path, array, step) for path, array in values().items()}
        for (path, index), tensor in zip(pieces, tensors, strict=True):
            tensor.grad = torch.tensor(problem.as_matrix(path, gradients[path][index]).copy())
        for optimizer in optimizers:
            optimizer.step()
    last = values()
    for optimizer in optimizers:
        getattr(optimizer, "eval", lambda: None)()
    return last, values()


def main():
    for name, make in CASES.items():
        # Muon's iteration is in bfloat16; float64 tells more about its formula.
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
            last, evaluated = trained(make)
        arrays = {f"param/{path}": array for path, array in last.items()}
        if any((evaluated[path] != last[path]).any() for path in last):
            arrays |= {f"average/{path}": array for path, array in evaluated.items()}
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
