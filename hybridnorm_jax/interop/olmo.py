"""The HybridNorm authors' checkpoints (their fork of OLMo), in."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.fields import present
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.placement import HEAD_NORMS, runs

_THEIR_HEAD_NORM = {"q_norm": "q_norm", "k_norm": "k_norm", "v_norm": "v_norm", "context_norm": "c_norm"}


class _Arrays:
    """Their arrays by name; remembers what was read, so that nothing is left over unnoticed."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name.removeprefix("param/"): array for name, array in arrays.items()}
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array, which must have this shape."""
        if name not in self.arrays:
            raise UserError(f"{name}: not in the checkpoint, but the configuration asks for it")
        array = np.asarray(self.arrays[name])
        if array.shape != shape:
            raise UserError(f"{name}: shape {array.shape} in the checkpoint, {shape} by the configuration")
        self.read.add(name)
        return array

    def check_all_read(self) -> None:
        """Raise for the first array that no part of the model took."""
        for name in self.arrays:
            if name not in self.read:
                raise UserError(f"{name}: in the checkpoint, but a model of this configuration has no place for it")


def params_from_olmo(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of `Decoder(config)` from a checkpoint of the HybridNorm authors' code.

    Their norms stand at the entrance of sublayers: attn_norm and ff_norm normalize what the sublayer reads, and where
    the residual is taken after the norm, the stream itself. Such a norm is the `post` norm of our sublayer before, or
    the embedding's; in their Post-Norm that leaves ln_f as the post norm of the last feed-forward layer. With OLMo 2's
    norm_after the two norms are `branch` norms.

    Args:
      config: of the model; its scheme must be one that their code has.
      arrays: parameter name -> array in PyTorch's (out, in) layout, with or without the prefix "param/".
        `att_proj` holds q, k, v stacked, `ff_proj` up and then gate.

    Returns:
      The tree of docs/parameters.md, float32 or as the arrays are.

    Raises:
      UserError: an array is missing, left over or of another shape, or the scheme is not expressible in their code.
    """
    source = _Arrays(arrays)
    width = config.d_model
    params: dict[str, Any] = {
        "token_embedding": {"embedding": source.take("transformer.wte.weight", config.vocab_size, width)}
    }
    if config.positions == "learned":
        table = source.take("transformer.wpe.weight", present(config.max_positions), width)
        params["position_embedding"] = {"embedding": table}
    if not config.tie_embeddings:
        params["head"] = {"kernel": source.take("transformer.ff_out.weight", config.vocab_size, width).T}
    if config.head_bias:
        params.setdefault("head", {})["bias"] = source.take("transformer.ff_out.bias", config.vocab_size)

    norms = _norms(config, source)
    for name in ("embedding_norm", "final_norm"):
        if name in norms:
            params[name] = norms[name]
    for number, run in enumerate(runs(config.placements)):
        layers = [_block(config, source, norms, layer) for layer in range(run.start, run.start + run.length)]
        params[f"run_{number}"] = _stack(layers)
    source.check_all_read()
    return params


def _norms(config: ModelConfig, source: _Arrays) -> dict[Any, dict[str, np.ndarray]]:
    """Parameters of every norm on the stream, by (layer, sublayer, "pre" | "branch" | "post") or an outer name."""
    sublayers = [(layer, name) for layer in range(config.num_layers) for name in ("attention", "feed_forward")]
    theirs = {"attention": "attn_norm", "feed_forward": "ff_norm"}
    found: dict[Any, dict[str, np.ndarray]] = {}
    # What a norm at the next entrance normalizes, if that entrance has no pre norm.
    before: str | tuple[int, str, str] | None = "embedding_norm" if config.has_embedding_norm else None
    for layer, name in sublayers:
        placement = getattr(config.placements[layer], name)
        entrance = f"transformer.blocks.{layer}.{theirs[name]}"
        if (placement.pre and before) or (placement.branch and (placement.pre or placement.post or before)):
            raise UserError(f"model.scheme={config.scheme}: two norms meet in layer {layer}; their code has one there")
        if placement.reads == "block" or placement.residual != "input" or set(placement.scales) != {1.0}:
            raise UserError(f"model.scheme={config.scheme}: its residuals or scales are not expressible in their code")
        if before:
            found[before] = _norm(config, source, entrance)
        for which in ("pre", "branch"):
            if getattr(placement, which):
                found[layer, name, which] = _norm(config, source, entrance)
        before = (layer, name, "post") if placement.post else None
    if before and config.has_final_norm:
        raise UserError(f"model.scheme={config.scheme}: two norms meet before the head, which their code cannot have")
    if config.has_final_norm:
        before = "final_norm"
    if before:
        found[before] = _norm(config, source, "transformer.ln_f")
    return found


def _norm(config: ModelConfig, source: _Arrays, name: str) -> dict[str, np.ndarray]:
    return _affine(source, name, config.d_model, config.norm_scale, config.norm_bias)


def _affine(source: _Arrays, name: str, width: int, scale: bool, bias: bool) -> dict[str, np.ndarray]:
    found = {"scale": source.take(f"{name}.weight", width)} if scale else {}
    return found | ({"bias": source.take(f"{name}.bias", width)} if bias else {})


def _block(config: ModelConfig, source: _Arrays, norms: Mapping, layer: int) -> dict[str, Any]:
    prefix = f"transformer.blocks.{layer}"
    block: dict[str, Any] = {
        "attention": _attention(config, source, prefix, layer),
        "feed_forward": _feed_forward(config, source, prefix),
    }
    for sublayer in ("attention", "feed_forward"):
        for which in ("pre", "branch", "post"):
            if (layer, sublayer, which) in norms:
                block[f"{sublayer}_{which}_norm"] = norms[layer, sublayer, which]
    return block


def _attention(config: ModelConfig, source: _Arrays, prefix: str, layer: int) -> dict[str, Any]:
    heads, kv_heads, head_dim, width = config.num_heads, config.num_kv_heads, config.head_dim, config.d_model
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    rows = sum(counts.values()) * head_dim
    splits = np.cumsum([count * head_dim for count in counts.values()])[:-1]
    kernels = np.split(source.take(f"{prefix}.att_proj.weight", rows, width), splits)
    out = source.take(f"{prefix}.attn_out.weight", width, heads * head_dim)
    found: dict[str, Any] = {
        name: {"kernel": kernel.T.reshape(width, count, head_dim)}
        for (name, count), kernel in zip(counts.items(), kernels, strict=True)
    }
    found["out"] = {"kernel": out.T.reshape(heads, head_dim, width)}
    if config.attention_bias:
        biases = np.split(source.take(f"{prefix}.att_proj.bias", rows), splits)
        for (name, count), bias in zip(counts.items(), biases, strict=True):
            found[name]["bias"] = bias.reshape(count, head_dim)
        found["out"]["bias"] = source.take(f"{prefix}.attn_out.bias", width)
    for name in HEAD_NORMS:
        extent = getattr(config.placements[layer], name)
        if extent is not None:
            count = 1 if extent == "head" else (kv_heads if name in ("k_norm", "v_norm") else heads)
            theirs, flags = (
                f"{prefix}.{_THEIR_HEAD_NORM[name]}",
                (config.attention_norm_scale, config.attention_norm_bias),
            )
            found[name] = _affine(source, theirs, count * head_dim, *flags)
    return found


def _feed_forward(config: ModelConfig, source: _Arrays, prefix: str) -> dict[str, Any]:
    gated, mlp, width = config.activation == "swiglu", config.mlp_dim, config.d_model
    names = ("up", "gate") if gated else ("up",)
    kernels = np.split(source.take(f"{prefix}.ff_proj.weight", len(names) * mlp, width), len(names))
    found = {name: {"kernel": kernel.T} for name, kernel in zip(names, kernels, strict=True)}
    found["down"] = {"kernel": source.take(f"{prefix}.ff_out.weight", width, mlp).T}
    if config.mlp_bias:
        biases = np.split(source.take(f"{prefix}.ff_proj.bias", len(names) * mlp), len(names))
        for name, bias in zip(names, biases, strict=True):
            found[name]["bias"] = bias
        found["down"]["bias"] = source.take(f"{prefix}.ff_out.bias", width)
    return found


def _stack(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """One tree whose leaves carry the layers in front."""
    first = layers[0]
    return {
        name: _stack([layer[name] for layer in layers])
        if isinstance(first[name], dict)
        else np.stack([layer[name] for layer in layers])
        for name in first
    }
