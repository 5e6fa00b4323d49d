"""Forward time of a Pre-LN model and of its cheaper forms in PyTorch, in turns.

    python benchmarks/converted_in_torch.py [--rounds 7] [--models small,medium,vit_b] [--batches 1,8] [--parts]

Models have GPT-2's shape, or ViT's, and random weights. Each is converted, all forms are exported, and transformers
loads them with our PyTorch code; `transformers` is its own class with the same weights. Inputs are 512 tokens, or one
image; float32, eager, no cache. A number is the median over rounds of a form's time over that of our Pre-LN model in
the same round. With --parts it prints how much of a forward pass all norms together take, and the head.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.model.abstract_params import abstract_params

PRE_LN = {"scheme": "pre", "norm": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True}
GPT2 = {**PRE_LN, "positions": "learned", "max_positions": 1024, "activation": "gelu_tanh", "tie_embeddings": True}
# Layers and vocabulary of medium are a part of its 24 and 50257, so that all forms fit in memory together.
MODELS = {
    "small": hn.ModelConfig(**GPT2, d_model=768, num_layers=12, num_heads=12, vocab_size=50257),
    "medium": hn.ModelConfig(**GPT2, d_model=1024, num_layers=8, num_heads=16, vocab_size=16752),
    "vit_b": hn.EncoderConfig(
        **PRE_LN, activation="gelu", d_model=768, num_layers=12, num_heads=12, norm_eps=1e-12, num_classes=1000
    ),
}
TOKENS = 512


def auto_class(config: hn.ModelConfig) -> Any:
    """What loads a model of this kind."""
    is_encoder = isinstance(config, hn.EncoderConfig)
    return transformers.AutoModelForImageClassification if is_encoder else transformers.AutoModelForCausalLM


def forms_of(config: hn.ModelConfig, folder: Path) -> dict[str, torch.nn.Module]:
    """Every form of one model, by its name."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        drawn = rng.standard_normal(like.shape, np.float32) * np.float32(0.02)
        return drawn + np.float32(path[-1].key == "scale")

    params = jax.tree.map_with_path(leaf, abstract_params(config))
    saved = {
        "pre_ln": ("hybridnorm", config, params),
        "transformers": (None, config, params),
        "pre_rmsnorm": ("hybridnorm", *equivalence.to_pre_rmsnorm(config, params)),
        "pre_crmsnorm": ("hybridnorm", *equivalence.to_pre_crmsnorm(config, params)),
        "pre_crmsnorm_padded": ("hybridnorm", *equivalence.to_pre_crmsnorm(config, params, pad_to=128)),
    }
    loaded = {}
    for name, (architecture, form, tree) in saved.items():
        form = dataclasses.replace(form, param_dtype="float32")
        save_huggingface(folder / name, form, jax.tree.map(np.asarray, tree), architecture=architecture)
        loaded[name] = auto_class(config).from_pretrained(folder / name, trust_remote_code=True)
    return loaded


def inputs_of(config: hn.ModelConfig, batch: int) -> torch.Tensor:
    """Random tokens, or random pixels."""
    rng = np.random.default_rng(1)
    if isinstance(config, hn.EncoderConfig):
        shape = (batch, config.num_channels, *config.image_size)
        return torch.from_numpy(rng.standard_normal(shape, np.float32))
    return torch.from_numpy(rng.integers(0, 16000, (batch, TOKENS)))


class Parts:
    """Seconds that a model spends in its norms and its head. On a CPU a call returns when its work is done."""

    KINDS = {"Norm": "norms", "LayerNorm": "norms"}  # noqa: RUF012 - ours and torch's

    def __init__(self, model: torch.nn.Module):
        self.seconds = {"norms": 0.0, "head": 0.0}
        for name, module in model.named_modules():
            part = "head" if name in ("lm_head", "classifier") else self.KINDS.get(type(module).__name__)
            if part is not None:
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(partial(self._stop, part))

    def _start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def _stop(self, part: str, *_: object) -> None:
        self.seconds[part] += time.perf_counter() - self.start

    def take(self) -> dict[str, float]:
        """What has been measured since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken


def measure(forms: dict[str, torch.nn.Module], inputs: torch.Tensor, rounds: int, parts: dict[str, Parts]) -> list[str]:
    """A line for each form; `parts` of each, where they are asked for."""
    without_cache = {} if inputs.is_floating_point() else {"use_cache": False}
    times: dict[str, list[float]] = {name: [] for name in forms}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, model in forms.items():
            start = time.perf_counter()
            model(inputs, **without_cache)
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
            if name in parts:
                taken[name].append(parts[name].take())
    lines = []
    for name, measured in times.items():
        ratios = [ours / before for ours, before in zip(measured, times["pre_ln"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        line = f"{name:22}{statistics.median(measured):8.3f} s {middle:6.3f} ({low:.3f}-{high:.3f})"
        for part in ("norms", "head") if parts else ():
            line += f"  {part} {1000 * statistics.median(each[part] for each in taken[name][1:]):6.1f} ms"
        lines.append(line)
    return lines


def main() -> None:
    """Measure, and print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            forms = forms_of(MODELS[model], Path(folder))
            parts = {name: Parts(form) for name, form in forms.items()} if options.parts else {}
            for batch in map(int, options.batches.split(",")):
                inputs = inputs_of(MODELS[model], batch)
                for line in measure(forms, inputs, options.rounds, parts):
                    print(f"{model:8}batch {batch:<4}{line}", flush=True)


if __name__ == "__main__":
    main()
