"""Our own Decoder in its three forms: its residual layout, and whole-model conversion; forms.py is what others call."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict

from hybridnorm_jax.equivalence.layout import (
    NormBias,
    NormScale,
    Reads,
    ResidualLayout,
    Role,
    Untouched,
    Writes,
)
from hybridnorm_jax.equivalence.model_params import assert_params
from hybridnorm_jax.equivalence.plain_models import plain_decoder, plain_decoder_params, without_stream_norms
from hybridnorm_jax.equivalence.transforms import compress, fold_affine, recenter, stored_width
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.placement import HEAD_NORMS, HIDDEN_NORMS, SublayerName
from hybridnorm_jax.model.runs import Run

# The first part of the path of every leaf that is added to the stream before the first block.
ENTRANCES = (
    "patch_embedding",
    "token_embedding",
    "class_token",
    "distillation_token",
    "register_tokens",
    "mask_token",
    "position_embedding",
)
EMBEDDING_CENTRING = "the stream behind the norm after the embedding (model.embedding_centring)"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How Pre-LN parameters become those of a cheaper form.

    Attributes:
      config: of the model in that form.
      convert: parameters of the given config -> those of `config`; pure and differentiable.
      layout: of the trees that `convert` returns.
      centrings: where a mean over the channels is still subtracted in the forward pass, in words; most often nowhere.
      changes: what else than norms, readers and writers is another in the new model, in words.
    """

    config: ModelConfig
    convert: Callable[[Any], dict[str, Any]]
    layout: ResidualLayout
    centrings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def decoder_conversion(config: ModelConfig, form: str, *, pad_to: int = 1) -> Conversion:
    """forms.conversion_of for a Decoder."""
    check_pre_layernorm(config)
    compresses = form == "pre_crmsnorm"
    roomy, changes = plain_decoder(config, compressed=compresses)
    plain = without_stream_norms(roomy, keeps_outer=roomy.embedding_centring)
    # They say how a model of this shape starts; what follows from them for the function is in its other keys.
    plain = dataclasses.replace(plain, base_width=None, base_head_dim=None)
    before, after = decoder_layout(roomy), decoder_layout(plain)

    def convert(params: Any) -> dict[str, Any]:
        folded = fold_affine(plain_decoder_params(config, roomy, params), before)
        return checked(plain, recenter(folded, after))

    centrings = (EMBEDDING_CENTRING,) if plain.embedding_centring else ()
    conversion = Conversion(config=plain, convert=convert, layout=after, centrings=centrings, changes=changes)
    if not compresses:
        return conversion
    return compressed(conversion, decoder_layout, pad_to=pad_to, whole_outside=plain.embedding_centring)


def check_pre_layernorm(config: ModelConfig) -> None:
    """Raise ConfigError for a model that is not Pre-LN; the message names what keeps it from being one."""
    if obstacle := config.pre_layernorm_obstacle:
        raise ConfigError(f"{obstacle}: only LayerNorm at the entrance of every branch and before the head converts")


def compressed(
    conversion: Conversion, layout_of: Callable[[Any], ResidualLayout], *, pad_to: int, **keys: Any
) -> Conversion:
    """A conversion to Pre-RMSNorm, gone on with to Pre-CRMSNorm.

    Args:
      conversion: to Pre-RMSNorm.
      layout_of: the layout of a model of a configuration.
      pad_to: see forms.to_pre_crmsnorm.
      keys: of the configuration, which are other ones with CRMSNorm.
    """
    plain = conversion.config
    stored = stored_width(plain.d_model, pad_to)
    small = dataclasses.replace(plain, norm="crmsnorm", d_model=stored, norm_width=plain.d_model, **keys)
    layout = layout_of(small)

    def convert(params: Any) -> dict[str, Any]:
        return checked(small, compress(conversion.convert(params), layout, pad_to=pad_to))

    return dataclasses.replace(conversion, config=small, convert=convert, layout=layout)


def checked(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, of which it is asserted that they are those of a model of this config."""
    assert_params(config, params)
    return params


def decoder_layout(config: ModelConfig) -> ResidualLayout:
    """The residual layout of Decoder(config), Pre-Norm, whose head is untied or reads a norm without parameters.

    With embedding_centring the norms after the embedding and before the head stay what they are, and so does the head.
    """
    if config.embedding_centring:
        return layout_of_blocks(config)
    rules: dict[str, Role] = {"token_embedding/embedding": Writes()}
    if config.positions == "learned":
        rules["position_embedding/embedding"] = Writes()
    rules |= _blocks_rules(config)
    rules |= _norm_rules("final_norm", scale=config.outer_norm_scale, bias=config.outer_norm_bias, config=config)
    if not config.tie_embeddings:
        has_parameters = config.outer_norm_scale or config.outer_norm_bias
        rules["head/kernel"] = Reads("final_norm" if has_parameters else None)
    elif config.head_bias:
        rules["head/bias"] = Untouched()
    return ResidualLayout(rules)


def layout_of_blocks(config: ModelConfig) -> ResidualLayout:
    """The residual layout of a Pre-Norm model in which the blocks and what enters them touch the stream, and no more.

    With whole_outside the blocks alone do.
    """
    rules: dict[str, Role] = {}
    for path in flatten_dict(abstract_params(config), sep="/"):
        first = path.partition("/")[0]
        if not first.startswith("run_"):
            is_entrance = first in ENTRANCES and not config.whole_outside
            rules[path] = Writes() if is_entrance else Untouched()
    return ResidualLayout(rules | _blocks_rules(config))


def _blocks_rules(config: ModelConfig) -> dict[str, Role]:
    """The rules of all runs."""
    rules: dict[str, Role] = {}
    for number, run in enumerate(config.runs):
        rules |= _run_rules(config, run, f"run_{number}")
    return rules


def _run_rules(config: ModelConfig, run: Run, name: str) -> dict[str, Role]:
    """The rules of one run, whose leaves have the layers in front."""
    rules: dict[str, Role] = {}
    branches: dict[SublayerName, _Projections] = {
        "attention": _Projections(
            readers={"query": 1, "key": 1, "value": 1},
            writers=("out",),
            has_output_bias=config.has_attention_output_bias,
        ),
        "feed_forward": _feed_forward_projections(config, run),
    }
    for sublayer, projections in branches.items():
        shares = sublayer == "feed_forward" and run.structure.shared_pre_norm
        norm, scales = f"{name}/{'attention' if shares else sublayer}_pre_norm", run.scales(sublayer).input
        read = norm if config.norm_scale or config.norm_bias else None
        if not shares:
            rules |= _norm_rules(norm, scale=config.norm_scale, bias=config.norm_bias, config=config)
        for reader, axis in projections.readers.items():
            role = Reads(read, axis, input_scale=1.0 if scales is None else scales)
            rules[f"{name}/{sublayer}/{reader}/kernel"] = role
        for writer in projections.writers:
            rules[f"{name}/{sublayer}/{writer}/kernel"] = Writes()
            if projections.has_output_bias:
                rules[f"{name}/{sublayer}/{writer}/bias"] = Writes()
    if config.balance_bias and run.has_experts:
        rules[f"{name}/feed_forward/balance_bias"] = Untouched()
    if config.attention_sinks:
        rules[f"{name}/attention/sinks"] = Untouched()
    for norm in HEAD_NORMS:
        if getattr(run.structure, norm):
            rules |= _inner_norm_rules(config, f"{name}/attention/{norm}")
    for norm in HIDDEN_NORMS:
        if getattr(run.structure, norm) and (norm != "gate_norm" or config.is_gated):
            rules |= _inner_norm_rules(config, f"{name}/feed_forward/{norm}")
    if run.structure.head_scales == "before":
        rules[f"{name}/attention/head_scales/scale"] = Untouched()
    return rules


@dataclasses.dataclass(frozen=True)
class _Projections:
    """The projections of a branch.

    Attributes:
      readers: name -> the axis of its kernel that the stream is on; layers come first in a kernel, then experts.
      writers: names of those that write the stream.
      has_output_bias: whether these have biases.
    """

    readers: dict[str, int]
    writers: tuple[str, ...]
    has_output_bias: bool


def _feed_forward_projections(config: ModelConfig, run: Run) -> _Projections:
    if not run.has_experts:
        readers: dict[str, int] = {"up": 1}
        writers: tuple[str, ...] = ("down",)
        if config.is_gated:
            readers["gate"] = 1
    else:
        readers, writers = {"router": 1, "expert_gate": 2, "expert_up": 2}, ("expert_down",)
        if config.shared_width:
            readers |= {"shared/gate": 1, "shared/up": 1}
            writers = ("expert_down", "shared/down")
        if config.shared_expert_gate:
            readers["shared_gate"] = 1
    return _Projections(readers=readers, writers=writers, has_output_bias=config.has_mlp_output_bias)


def _inner_norm_rules(config: ModelConfig, path: str) -> dict[str, Role]:
    """A norm inside attention or the feed-forward layer, which does not touch the stream."""
    rules: dict[str, Role] = {}
    if config.attention_norm_scale:
        rules[f"{path}/scale"] = Untouched()
    if config.attention_norm_bias:
        rules[f"{path}/bias"] = Untouched()
    return rules


def _norm_rules(path: str, *, scale: bool, bias: bool, config: ModelConfig) -> dict[str, Role]:
    """A norm on the stream, with a scale and a bias or without."""
    rules: dict[str, Role] = {}
    if scale:
        rules[f"{path}/scale"] = NormScale(plus_one=config.norm_scale_plus_one)
    if bias:
        rules[f"{path}/bias"] = NormBias()
    return rules
