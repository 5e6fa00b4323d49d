"""Attention over grouped heads, and the choice of what computes it.

xla is ours for any platform. The others are fused kernels: cudnn and flash (ours) for GPUs, splash for TPUs.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from hybridnorm_jax.config_fields import check, check_choice
from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads, KeyValueHeads, SegmentIds
from hybridnorm_jax.kernels.attention_on_mesh import on_mesh, rules_on_mesh, sequence_axes
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS, FEATURES, SAVED, SPLASH_TILE
from hybridnorm_jax.kernels.blockwise_attention import blockwise_attention
from hybridnorm_jax.kernels.gpu_cudnn import cudnn_attention
from hybridnorm_jax.kernels.head_preparation import Preparation, prepared
from hybridnorm_jax.kernels.score_rules import PLAIN, ScoreRules
from hybridnorm_jax.kernels.split_sequence import zigzag_attention


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What a fused kernel can do: head_dim must be a multiple of head_dim_step, at most head_dim_max.

    `features` are those of backend_names.FEATURES that it has.
    """

    platform: str
    dtypes: tuple[str, ...]
    segment_ids: bool
    head_dim_step: int
    head_dim_max: int
    features: tuple[str, ...] = ()


_LIMITS = {
    "cudnn": _Limits(
        platform="gpu",
        dtypes=("bfloat16", "float16"),
        segment_ids=False,
        head_dim_step=8,
        head_dim_max=256,  # see _CUDNN_BEFORE_HOPPER
        features=("bidirectional",),
    ),
    "flash": _Limits(
        platform="gpu",
        dtypes=("bfloat16", "float16", "float32"),
        segment_ids=True,
        head_dim_step=1,
        head_dim_max=256,
    ),
    "splash": _Limits(
        platform="tpu",
        dtypes=("bfloat16", "float32"),
        segment_ids=True,
        head_dim_step=8,
        head_dim_max=256,
    ),
}


# The largest head of cudnn on GPUs before compute capability 9.0.
_CUDNN_BEFORE_HOPPER = 128
_HOPPER = 9


def resolve_backend(
    name: str,
    *,
    platform: str | None,
    dtype: Any,
    head_dim: int,
    segment_ids: bool,
    capability: str | None = None,
    features: tuple[str, ...] = (),
) -> str:
    """The backend that computes attention: the named one, or the one that "auto" stands for.

    "auto" is the platform's first fused kernel that can do what is asked, and xla elsewhere: on GPUs cudnn, or flash.

    Args:
      name: auto | xla | cudnn | flash | splash.
      platform: of the devices that will run it: cpu | gpu | tpu. With None a named backend's platform is not checked.
      dtype: of q, k and v.
      head_dim: of q, k and v.
      segment_ids: whether there are any.
      capability: compute capability of the GPUs, such as "9.0"; None: not known, so what all GPUs can do.
      features: what is asked besides causal attention: score_rules.ScoreRules.features, or ModelConfig's
        score_features.

    Raises:
      ConfigError: the named backend cannot do this; the message says why.
    """
    check_choice("model.attention", name, ATTENTION_BACKENDS)
    is_old = platform == "gpu" and (capability is None or int(capability.partition(".")[0]) < _HOPPER)

    def obstacle(name: str) -> str | None:
        limits = _LIMITS.get(name)
        if limits is not None and name == "cudnn" and is_old:
            limits = dataclasses.replace(limits, head_dim_max=_CUDNN_BEFORE_HOPPER)
        if limits is None:
            return None
        missing = (FEATURES[feature] for feature in features if feature not in limits.features)
        return _obstacle(limits, platform, dtype, head_dim, segment_ids) or next(missing, None)

    if name == "auto":
        return next((fused for fused in _LIMITS if obstacle(fused) is None), "xla")
    reason = obstacle(name)
    check(reason is None, "model.attention", name, f"{reason}; use auto or xla")
    return name


def _obstacle(limits: _Limits, platform: str | None, dtype: Any, head_dim: int, segment_ids: bool) -> str | None:
    """Why the backend with these limits cannot do it, or None."""
    if platform not in (None, limits.platform):
        return f"needs platform {limits.platform}, this is {platform}"
    if jnp.dtype(dtype).name not in limits.dtypes:
        return f"needs model.dtype {' or '.join(limits.dtypes)}, not {jnp.dtype(dtype).name}"
    if segment_ids and not limits.segment_ids:
        return "has no segment ids, which data.segment_ids=true and data.packing=documents need"
    if head_dim % limits.head_dim_step or head_dim > limits.head_dim_max:
        multiple = f"a multiple of {limits.head_dim_step} up to {limits.head_dim_max}"
        return f"needs model.head_dim {multiple}, not {head_dim}"
    return None


def softmax_attention(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    *,
    segment_ids: SegmentIds = None,
    rules: ScoreRules = PLAIN,
    preparation: Preparation | None = None,
    backend: str = "xla",
) -> Heads:
    """softmax(scale * q k^T + mask) v, in the query's dtype; the softmax in float32 at least.

    Query head h reads key and value head h // (heads / kv_heads). A token sees itself and earlier tokens. Where
    segment_ids are given, it sees only those of its own segment. Reverse-mode differentiable. On a mesh that splits
    the sequence, xla, flash and splash compute it in shares of equal work (zigzag.py); cudnn gathers the sequence.

    Args:
      rules: what else is made of the scores; by default scale = 1 / sqrt(head_dim).
      preparation: norms and rotation of the heads, which come before everything else.
      backend: as in resolve_backend. "auto" looks at the default platform. A named backend is used whatever the
        platform is, so that one can compile for a platform that is not here.

    Raises:
      ConfigError: the named backend cannot do this.
    """
    rules = rules.within(query.shape[1])
    backend = resolve_backend(
        backend,
        platform=jax.default_backend() if backend == "auto" else None,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        segment_ids=segment_ids is not None,
        capability=capability_of(jax.devices()[0]) if backend == "auto" else None,
        features=rules.features,
    )
    scale = rules.scale_of(query.shape[-1])
    inputs = AttentionInputs(query, key, value, segment_ids)
    preparation = Preparation() if preparation is None else preparation
    if backend == "splash":
        from hybridnorm_jax.kernels.tpu_splash import splash_attention  # imports Pallas, which takes a while

        return splash_attention(inputs, preparation, scale=scale, saved_as=SAVED)
    inputs = prepared(inputs, preparation)
    match backend:
        case "xla":
            axes = sequence_axes(query.shape[1])
            if not axes:
                return blockwise_attention(inputs, rules)
            local = functools.partial(zigzag_attention, axes=axes, saved_as=SAVED)
            return on_mesh(local, inputs, sequence=axes, kernel=rules, kernel_specs=rules_on_mesh(rules, inputs, axes))
        case "cudnn":
            return cudnn_attention(inputs, scale=scale, causal=rules.causal)
        case "flash":
            from hybridnorm_jax.kernels.gpu_flash import flash_attention  # imports Pallas, which takes a while

            return flash_attention(inputs, scale=scale, saved_as=SAVED)


def capability_of(device: jax.Device) -> str | None:
    """The compute capability of a GPU of NVIDIA's, such as "9.0"; None for any other device."""
    capability = str(getattr(device, "compute_capability", ""))  # other makers have names there
    return capability if device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability) else None


def sequence_multiple(backend: str) -> int:
    """What a device's share of a sequence must be a multiple of, for a backend as resolve_backend returns it."""
    return SPLASH_TILE if backend == "splash" else 1
