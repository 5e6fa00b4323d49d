"""The HybridNorm authors' checkpoints (their fork of OLMo), in."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.named_arrays import NamedArrays
from hybridnorm_jax.interop.tensor_places import leaf_shapes
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.placement import HEAD_NORMS, SublayerPlacement

_THEIR_ENTRANCE_NORM = {"attention": "attn_norm", "feed_forward": "ff_norm"}
_THEIR_HEAD_NORM = {"q_norm": "q_norm", "k_norm": "k_norm", "v_norm": "v_norm", "context_norm": "c_norm"}


class _NormPlace(NamedTuple):
    """Where a norm on the stream stands: in a layer, at a sublayer, as its "pre", "branch" or "post" norm."""

    layer: int
    sublayer: str
    which: str


# The parameters of every norm on the stream; a name is that of a norm outside the layers.
_Norms = dict[_NormPlace | str, dict[str, np.ndarray]]


def _without_param(names: Sequence[str]) -> list[str]:
    return [name.removeprefix("param/") for name in names]


def params_from_olmo(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of `Decoder(config)` from a checkpoint of the HybridNorm authors' code.

    Their norms stand at the entrance of sublayers: attn_norm and ff_norm normalize what the sublayer reads. Where their
    residual is taken after the norm, it normalizes the stream itself. Such a norm is the `post` norm of our sublayer
    before, or the embedding's. In their Post-Norm that leaves ln_f as the post norm of the last feed-forward layer.
    With OLMo 2's norm_after the two norms are `branch` norms.

    Args:
      config: of the model; its scheme must be one that their code has.
      arrays: parameter name -> array in PyTorch's (out, in) layout, with or without the prefix "param/"; also an open
        .npz file. Pickles are not read: `np.load` with its default allow_pickle=False.
        `att_proj` holds q, k, v stacked, `ff_proj` up and then gate.

    Returns:
      The tree described in model/decoder.py, float32 or as the arrays are.

    Raises:
      UserError: an array is missing, left over, unreadable, of another shape or not of floats, or the scheme is not
        expressible in their code.
    """
    source = NamedArrays(arrays, names_of=_without_param)
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
    for number, run in enumerate(config.runs):
        layers = [_block(config, source, norms, layer) for layer in range(run.start, run.start + run.length)]
        params[f"run_{number}"] = _stack(layers)
    source.check_all_read()
    _check_complete(config, params)
    return params


def _check_complete(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Raise UserError for a parameter of the model that their code does not have, such as alpha of DyT."""
    found = flatten_dict(params, sep="/")
    for path in leaf_shapes(config):
        if path not in found:
            raise UserError(f"{path}: a parameter of this model, but their code does not have it")


def _norms(config: ModelConfig, source: NamedArrays) -> _Norms:
    found: _Norms = {}
    # Our norm that theirs at the next entrance is, if that entrance has no pre norm.
    before: _NormPlace | str | None = "embedding_norm" if config.has_embedding_norm else None
    for layer in range(config.num_layers):
        if config.placements[layer].normalizes_hidden or config.placements[layer].head_scales is not None:
            raise UserError(f"model.scheme={config.scheme}: their code has no norm in the FFN, and no scales of heads")
        for sublayer, their_norm in _THEIR_ENTRANCE_NORM.items():
            placement = getattr(config.placements[layer], sublayer)
            _check_expressible(config, layer, placement, has_norm_before=before is not None)
            entrance = f"transformer.blocks.{layer}.{their_norm}"
            if before is not None:
                found[before] = _norm(config, source, entrance)
            for which in ("pre", "branch"):
                if getattr(placement, which):
                    found[_NormPlace(layer, sublayer, which)] = _norm(config, source, entrance)
            before = _NormPlace(layer, sublayer, "post") if placement.post else None
    if before and config.has_final_norm:
        raise UserError(f"model.scheme={config.scheme}: two norms meet before the head, which their code cannot have")
    if config.has_final_norm:
        before = "final_norm"
    if before:
        found[before] = _norm(config, source, "transformer.ln_f")
    return found


def _check_expressible(config: ModelConfig, layer: int, placement: SublayerPlacement, *, has_norm_before: bool) -> None:
    """Raise UserError for a sublayer that their code cannot have."""
    meet_at_entrance = placement.pre and has_norm_before
    meet_at_branch = placement.branch and (placement.pre or placement.post or has_norm_before)
    if meet_at_entrance or meet_at_branch:
        raise UserError(f"model.scheme={config.scheme}: two norms meet in layer {layer}; their code has one there")
    if placement.reads == "block" or placement.residual != "input" or set(placement.scales) != {1.0}:
        raise UserError(f"model.scheme={config.scheme}: its residuals or scales are not expressible in their code")
    if placement.residual_vector or config.layer_scale_of(placement) is not None:
        raise UserError(f"model.scheme={config.scheme}: its learned scales are not expressible in their code")


def _norm(config: ModelConfig, source: NamedArrays, name: str) -> dict[str, np.ndarray]:
    """A norm on the stream."""
    return _affine(source, name, config.d_model, has_scale=config.norm_scale, has_bias=config.norm_bias)


def _affine(source: NamedArrays, name: str, width: int, *, has_scale: bool, has_bias: bool) -> dict[str, np.ndarray]:
    found = {}
    if has_scale:
        found["scale"] = source.take(f"{name}.weight", width)
    if has_bias:
        found["bias"] = source.take(f"{name}.bias", width)
    return found


def _block(config: ModelConfig, source: NamedArrays, norms: _Norms, layer: int) -> dict[str, Any]:
    prefix = f"transformer.blocks.{layer}"
    block: dict[str, Any] = {
        "attention": _attention(config, source, prefix, layer),
        "feed_forward": _feed_forward(config, source, prefix),
    }
    for sublayer in ("attention", "feed_forward"):
        for which in ("pre", "branch", "post"):
            place = _NormPlace(layer, sublayer, which)
            if place in norms:
                block[f"{sublayer}_{which}_norm"] = norms[place]
    return block


def _attention(config: ModelConfig, source: NamedArrays, prefix: str, layer: int) -> dict[str, Any]:
    heads, kv_heads, head_dim, width = config.num_heads, config.num_kv_heads, config.head_dim, config.d_model
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    rows = sum(counts.values()) * head_dim
    *splits, _ = np.cumsum([count * head_dim for count in counts.values()])
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
    return found | _head_norms(config, source, prefix, layer)


def _head_norms(config: ModelConfig, source: NamedArrays, prefix: str, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """The norms on q, k, v and the context, each over one head or over the projection."""
    heads_of = {
        "q_norm": config.num_heads,
        "k_norm": config.num_kv_heads,
        "v_norm": config.num_kv_heads,
        "context_norm": config.num_heads,
    }
    found = {}
    for name in HEAD_NORMS:
        extent = getattr(config.placements[layer], name)
        if extent is None:
            continue
        count = 1 if extent == "head" else heads_of[name]
        found[name] = _affine(
            source,
            f"{prefix}.{_THEIR_HEAD_NORM[name]}",
            count * config.head_dim,
            has_scale=config.attention_norm_scale,
            has_bias=config.attention_norm_bias,
        )
    return found


def _feed_forward(config: ModelConfig, source: NamedArrays, prefix: str) -> dict[str, Any]:
    gated, mlp, width = config.is_gated, config.mlp_dim, config.d_model
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
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
