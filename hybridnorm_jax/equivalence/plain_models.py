"""A Pre-LN model as one that the transforms cover: what is besides norms, readers and writers, said in these.

Each step gives the same function, exactly: a table of sines becomes a learned one, a norm of the token table a new
table, a scale of each channel behind a branch a part of the branch's last projection. A norm of tokens and positions
together stays, and the mean is subtracted behind it. Then come biases of zeros where a norm has a bias that its readers
must take, and a head of its own where the tied one cannot be folded into.
"""

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.equivalence.model_params import check_params
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_functions import layer_norm
from hybridnorm_jax.model.placement import BlockPlacement, SublayerPlacement
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.model.sinusoids import sinusoids

AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)

# What a branch ends with.
LAST_PROJECTIONS = ("attention/out", "feed_forward/down", "feed_forward/expert_down", "feed_forward/shared/down")


def with_roomy_blocks(config: AnyConfig) -> tuple[AnyConfig, tuple[str, ...]]:
    """(the model whose readers of norms have biases where the norms have, and without layer scale; that in words).

    Output projections have biases where they had them before. Biases of readers go without saying.
    """
    attention_bias = config.attention_bias or config.norm_bias
    mlp_bias = config.mlp_bias or config.norm_bias
    router_bias = config.num_experts > 0 and (config.has_router_bias or config.norm_bias)
    roomy = dataclasses.replace(
        config,
        attention_bias=attention_bias,
        attention_output_bias=_unless(attention_bias, config.has_attention_output_bias),
        mlp_bias=mlp_bias,
        mlp_output_bias=_unless(mlp_bias, config.has_mlp_output_bias),
        router_bias=_unless(mlp_bias, router_bias) if config.num_experts else None,
        shared_expert_gate_bias=config.shared_expert_gate and (config.shared_expert_gate_bias or config.norm_bias),
        layer_scale=False,
    )
    return roomy, ("layer scale is part of the branches' last projections",) if config.layer_scale else ()


def _unless(usual: bool, value: bool) -> bool | None:
    """None, which stands for the usual value, or the value where it is another one."""
    return None if value == usual else value


def without_stream_norms(config: AnyConfig, *, keeps_outer: bool) -> AnyConfig:
    """The model with RMSNorm on the stream, without parameters; norms of heads stay what they are.

    Args:
      config: of the model.
      keeps_outer: norms outside the blocks keep scale and bias.
    """
    outer = {} if keeps_outer else {"outer_norm_scale": False, "outer_norm_bias": False}
    bare = dataclasses.replace(
        config,
        scheme=_scheme_without_starts(config),
        norm="rmsnorm",
        attention_norm=config.attention_norm_kind,
        norm_scale=False,
        norm_bias=False,
        norm_scale_plus_one=False,
        **outer,
    )
    plus_one = config.norm_scale_plus_one and bare.has_scales_elsewhere
    return dataclasses.replace(bare, norm_scale_plus_one=plus_one)


def _scheme_without_starts(config: ModelConfig) -> str:
    """A scheme of the same placements in which no norm's scale starts at another value than 1, as there is none.

    Raises:
      ConfigError: the table has none.
    """
    own = config.scheme_rule
    right = tuple(_without_starts(placement) for placement in own.placements(config.num_layers))
    if right == own.placements(config.num_layers):
        return config.scheme
    ends = own.final_norm, own.embedding_norm, own.side_stream
    for name, rule in SCHEMES.items():
        same_ends = ends == (rule.final_norm, rule.embedding_norm, rule.side_stream)
        if same_ends and rule.placements(config.num_layers) == right:
            return name
    raise ConfigError(
        f"model.scheme={config.scheme}: starts a norm's scale at another value than 1, which converted models do not "
        "have; enter a scheme of the same placements without these starts"
    )


def _without_starts(placement: BlockPlacement) -> BlockPlacement:
    def started_at_1(sublayer: SublayerPlacement) -> SublayerPlacement:
        return dataclasses.replace(sublayer, pre_norm_init=1.0, branch_norm_init=1.0)

    return dataclasses.replace(
        placement, attention=started_at_1(placement.attention), feed_forward=started_at_1(placement.feed_forward)
    )


def folds_embedding_norm(config: ModelConfig) -> bool:
    """Whether the norm after the embedding sees rows of the token table alone."""
    return config.has_embedding_norm and not config.has_position_table


def centres_embedding(config: ModelConfig) -> bool:
    """Whether the norm after the embedding sees tokens and positions together, and so leaves a mean behind it."""
    return config.has_embedding_norm and config.has_position_table


def plain_decoder(config: ModelConfig, *, compressed: bool) -> tuple[ModelConfig, tuple[str, ...]]:
    """(the model that `plain_decoder_params` makes parameters of, what is done to it in words).

    Args:
      compressed: the stream is going to be stored without its last element.
    """
    folds, centres = folds_embedding_norm(config), centres_embedding(config)
    # With a centring the head keeps the norm before it, but its table loses the mean of every row.
    untied = config.tie_embeddings and (
        compressed or folds or centres or config.outer_norm_scale or config.outer_norm_bias
    )
    roomy, of_blocks = with_roomy_blocks(config)
    changes = {
        "the norm after the embedding is part of the token table": folds,
        "the tied head has a matrix of its own": untied,
        "positions: the table of sines and cosines is a learned one": config.positions == "sinusoidal",
    }
    plain = dataclasses.replace(
        roomy,
        tie_embeddings=config.tie_embeddings and not untied,
        head_bias=config.head_bias or (config.outer_norm_bias and not centres),
        positions="learned" if config.positions == "sinusoidal" else config.positions,
        embedding_norm="false" if folds else config.embedding_norm,
        embedding_scale=None if folds else config.embedding_scale,
        embedding_centring=centres,
    )
    return plain, (*(change for change, is_made in changes.items() if is_made), *of_blocks)


def plain_decoder_params(config: ModelConfig, plain: ModelConfig, params: Any) -> dict[str, Any]:
    """The parameters of the model `plain`, which plain_decoder made of config."""
    check_params(config, params)
    params = dict(params)
    table = jnp.asarray(params["token_embedding"]["embedding"])
    if config.tie_embeddings and not plain.tie_embeddings:
        params["head"] = {**params.get("head", {}), "kernel": table.T}
    if config.positions == "sinusoidal":
        rows = jnp.arange(config.position_offset + present(config.max_positions))
        learned = sinusoids(rows[None], config.d_model, table.dtype)[0]
        params["position_embedding"] = {"embedding": learned}
    if folds_embedding_norm(config):
        norm = params.pop("embedding_norm", {})
        params["token_embedding"] = {"embedding": _normalized(config, table, norm)}
    return roomy_params(config, plain, params)


def roomy_params(config: ModelConfig, roomy: ModelConfig, params: Any) -> dict[str, Any]:
    """The parameters of `roomy`: layer scale in the last projections, and biases of zeros where there are none yet."""
    if config.layer_scale:
        params = {name: _without_layer_scale(run) if name.startswith("run_") else run for name, run in params.items()}
    flat = flatten_dict(params, sep="/")
    dtype = next(iter(flat.values())).dtype
    for path, leaf in flatten_dict(abstract_params(roomy), sep="/").items():
        if path not in flat and path.endswith("/bias"):
            flat[path] = jnp.zeros(leaf.shape, dtype)
    return unflatten_dict(flat, sep="/")


def _normalized(config: ModelConfig, table: Array, norm: Any) -> Float[Array, "vocab embed"]:
    """What the norm after the embedding makes of every row."""
    wide = widened(table)
    scale, bias = (None if name not in norm else widened(norm[name]) for name in ("scale", "bias"))
    if scale is not None and config.norm_scale_plus_one:
        scale = 1 + scale
    if config.embedding_scale is not None:
        wide = config.embedding_scale * wide
    return layer_norm(wide, scale, bias, eps=config.norm_eps).astype(table.dtype)


def _without_layer_scale(run: Any) -> dict[str, Any]:
    """A run of layers whose branches' last projections have taken the scale of each channel."""
    flat = flatten_dict(run, sep="/")
    scales = {name: flat.pop(f"{name}_layer_scale/scale", None) for name in ("attention", "feed_forward")}
    for projection in LAST_PROJECTIONS:
        scale = scales[projection.partition("/")[0]]
        for path in (f"{projection}/kernel", f"{projection}/bias"):
            if scale is not None and path in flat:
                flat[path] = _times_channels(flat[path], scale)
    return unflatten_dict(flat, sep="/")


def _times_channels(leaf: Any, scale: Float[Array, "layers embed"]) -> Array:
    """A leaf (layers, ..., embed) times the scale of its layer's channels."""
    between = [1] * (leaf.ndim - 2)
    wide = widened(leaf) * widened(scale).reshape(scale.shape[0], *between, scale.shape[1])
    return wide.astype(leaf.dtype)
