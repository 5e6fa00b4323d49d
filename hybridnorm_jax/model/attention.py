"""The attention branch: grouped-query self-attention with norms on q, k, v and context, RoPE, ALiBi, windows, sinks."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs
from hybridnorm_jax.kernels.attention_backends import softmax_attention
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS
from hybridnorm_jax.kernels.blockwise_attention import attention_statistics
from hybridnorm_jax.kernels.cached_attention import CachedHeads, cached_attention
from hybridnorm_jax.kernels.dense_products import rows_product
from hybridnorm_jax.kernels.head_preparation import HeadNorm, Preparation, Rotation, prepared
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.kernels.score_rules import ScoreRules
from hybridnorm_jax.model import placement
from hybridnorm_jax.model.alibi import AlibiKind
from hybridnorm_jax.model.cache import CACHE, Slots, in_place
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.input_checks import check_at_least_one, check_per_token, check_stream
from hybridnorm_jax.model.layer_scale import StoredScale
from hybridnorm_jax.model.norm_functions import plus_one, unit
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.norms import Norm
from hybridnorm_jax.model.rotation import default_positions, rotation
from hybridnorm_jax.model.signal_measures import SIGNAL


class HeadNormParameters(nn.Module):
    """The scale and bias of a norm of heads, for whoever applies it; None where one is not asked for.

    Parameters: `scale` and `bias`. With scale_plus_one the scale that is returned is 1 + `scale`.
    """

    use_scale: bool
    use_bias: bool
    scale_plus_one: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, head_dim: int) -> tuple[Float[Array, " head_dim"] | None, Float[Array, " head_dim"] | None]:
        start = nn.initializers.zeros if self.scale_plus_one else nn.initializers.ones
        scale = self.param("scale", start, (head_dim,), self.param_dtype) if self.use_scale else None
        if scale is not None and self.scale_plus_one:
            scale = plus_one(scale, self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (head_dim,), self.param_dtype) if self.use_bias else None
        return scale, bias


class HeadScales(nn.Module):
    """A learned number for each head, which starts at 1.

    Parameters: `scale` (heads,).
    """

    param_dtype: Any

    @nn.compact
    def __call__(self, heads: int) -> Float[Array, " heads"]:
        scale: Float[Array, " heads"] = self.param("scale", nn.initializers.ones, (heads,), self.param_dtype)
        return scale


class Attention(nn.Module):
    """softmax(N(q) N(k)^T / sqrt(head_dim) + causal mask) N(v), normalized, times W_O. HybridNorm (2503.04598), eq. 5.

    Query head h reads key and value head h // (num_heads / num_kv_heads). Norms stand before RoPE. What else may be
    made of the scores, kernels/score_rules.py says.

    Parameters: `query/kernel` (embed, heads, head_dim), `key/kernel` and `value/kernel` (embed, kv_heads, head_dim),
    `out/kernel` (heads, head_dim, embed), their `bias` where asked for, `q_norm`, `k_norm`, `v_norm`, `context_norm`
    with `scale` and `bias` (head_dim,), (heads, head_dim) where each head has its own, or (heads * head_dim,) over the
    projection; `head_scales/scale` (heads,), `sinks` (heads,), `qk_scale/scale` (kv_heads, head_dim) where asked for.

    Attributes:
      num_heads: heads of q.
      num_kv_heads: heads of k and v; None: num_heads.
      head_dim: width of a head; None: embed / num_heads.
      q_norm, k_norm, v_norm, context_norm: None, "head" or "projection".
      head_scales: a learned number for each head, starting at 1: "before" W_O times the head's context, "after" W_O
        times one of as many equal parts of the channels. NormFormer (2110.09456); None: there are none.
      sphere: behind the rotation q and k of each head are divided by their length and times s, one learned number for
        each channel of each head of k, which starts at 1; a head of q takes those of the head of k that it reads.
        Scores are times sqrt(head_dim). nGPT (2410.01131), section 2.3.
      norm, norm_epsilon, norm_scale, norm_bias, norm_scale_plus_one: Norm's kind, epsilon, use_scale, use_bias and
        scale_plus_one for all of these.
      norm_per_head: a norm over a head has scale and bias for each head.
      norm_starts: Norm's starts for all of these.
      rope_theta: base of the rotary wavelengths; None: q and k are not rotated.
      rotary_dim: how many leading channels of a head rotate; None: all.
      alibi: which ALiBi is added to the scores; None: none.
      score_scale: factor of q k^T; None: 1 / sqrt(head_dim), with sphere sqrt(head_dim).
      score_cap: scores s become score_cap * tanh(s / score_cap); None: no cap.
      qkv_clip: q, k and v are clipped to [-qkv_clip, qkv_clip] after their projections; None: they are not.
      window: a token sees keys at a distance less than this; None: all.
      causal: a token sees no later ones.
      use_sinks: the softmax has one more term exp(sink).
      use_bias: biases on the four projections.
      use_output_bias: a bias on the output projection; None: use_bias.
      backend: what computes the attention itself, see kernels.attention_backends.
      dtype, param_dtype: of the computation and of the parameters.
      input_init, value_init, output_init: initializers of q and k, of v, and of the output projection.

    Raises:
      ValueError: sizes or shapes that do not fit, or positions where nothing rotates; names the argument.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    q_norm: placement.HeadNorm = None
    k_norm: placement.HeadNorm = None
    v_norm: placement.HeadNorm = None
    context_norm: placement.HeadNorm = None
    head_scales: placement.HeadScales = None
    sphere: bool = False
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_scale: bool = True
    norm_bias: bool = False
    norm_scale_plus_one: bool = False
    norm_per_head: bool = False
    norm_starts: Mapping[str, float] | None = None
    rope_theta: float | None = None
    rotary_dim: int | None = None
    alibi: AlibiKind | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    qkv_clip: float | None = None
    window: int | None = None
    causal: bool = True
    use_sinks: bool = False
    use_bias: bool = False
    use_output_bias: bool | None = None
    backend: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    input_init: Callable[..., Array] = truncated_normal(0.02)
    value_init: Callable[..., Array] = truncated_normal(0.02)
    output_init: Callable[..., Array] = truncated_normal(0.02)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rotation: Rotation | None = None,
        layer_window: Int[Array, ""] | None = None,
        slots: Slots | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """What attention adds to the stream, in the compute dtype.

        Args:
          positions: of each token in its document, for RoPE and ALiBi; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          rotation: what hn.rotation(positions, ...) gives, where many layers share it; takes the place of positions,
            rope_theta and rotary_dim.
          layer_window: in the place of the attribute window, where it is known when the program runs and not before.
          slots: keep the keys and values of these tokens in these slots of the collection CACHE. One token attends to
            the tokens that are kept there. Several tokens are the first ones, and attend to each other.
        """
        self._check(x, positions, segment_ids)
        num_kv_heads, head_dim = self._sizes(x.shape[-1])
        if rotation is None:
            rotation = self._rotation(x.shape[1], head_dim, positions)
        elif positions is not None:
            raise ValueError("positions: they are in the rotation already; give one of the two")
        dense = partial(nn.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=rows_product)

        def project(name: str, heads: int, init: Callable[..., Array]) -> Float[Array, "batch seq heads head_dim"]:
            module = dense((heads, head_dim), kernel_init=init, use_bias=self.use_bias, name=name)
            projected: Float[Array, "batch seq heads head_dim"] = module(x)
            return projected if self.qkv_clip is None else jnp.clip(projected, -self.qkv_clip, self.qkv_clip)

        q = project("query", self.num_heads, self.input_init)
        k = project("key", num_kv_heads, self.input_init)
        v = project("value", num_kv_heads, self.value_init)
        q, query_norm = self._norm_of_heads("q_norm", q)
        k, key_norm = self._norm_of_heads("k_norm", k)
        v, value_norm = self._norm_of_heads("v_norm", v)
        preparation = Preparation(query=query_norm, key=key_norm, value=value_norm, rotation=rotation)
        rules = self._rules(x.shape[1], positions, layer_window, head_dim)
        inputs = AttentionInputs(q, k, v, segment_ids)
        if self.sphere:
            inputs, preparation = self._on_sphere(prepared(inputs, preparation), x.shape[-1]), Preparation()
        context = self._context(inputs, preparation, rules, slots)
        context = self._normalize("context_norm", context)
        if self.head_scales == "before":
            context = self._scale_heads(context)
        use_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        out = dense(x.shape[-1], axis=(-2, -1), kernel_init=self.output_init, use_bias=use_bias, name="out")
        written: Float[Array, "batch seq embed"] = out(context)
        if self.head_scales != "after":
            return written
        return self._scale_heads(written.reshape(*x.shape[:2], self.num_heads, -1)).reshape(x.shape)

    def _check(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int[Array, "batch seq"] | None,
        segment_ids: Int[Array, "batch seq"] | None,
    ) -> None:
        """Raise ValueError for inputs, or an attribute, that cannot be."""
        check_stream(x)
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            check_per_token(name, array, batch=x.shape[0], seq=x.shape[1])
        if self.backend not in ATTENTION_BACKENDS:
            raise ValueError(f"backend={self.backend!r}: must be {', '.join(ATTENTION_BACKENDS)}")
        if self.head_scales not in (None, "before", "after"):
            raise ValueError(f"head_scales={self.head_scales!r}: must be None, 'before' or 'after'")
        if self.head_scales == "after" and x.shape[-1] % self.num_heads:
            raise ValueError(f"head_scales='after': num_heads={self.num_heads} must divide the width, {x.shape[-1]}")

    def _on_sphere(self, inputs: AttentionInputs, embed: int) -> AttentionInputs:
        """The inputs with q and k of length 1, times their learned numbers."""
        q, k, v, segment_ids = inputs
        of_keys = StoredScale(1.0, 1 / math.sqrt(embed), self.param_dtype, name="qk_scale")(*k.shape[2:])
        of_queries = jnp.repeat(of_keys, q.shape[2] // k.shape[2], axis=0)

        def scaled(heads: Array, scale: Array) -> Array:
            return (unit(widened(heads)) * scale).astype(heads.dtype)

        return AttentionInputs(scaled(q, of_queries), scaled(k, of_keys), v, segment_ids)

    def _scale_heads(self, heads: Float[Array, "batch seq heads channels"]) -> Float[Array, "batch seq heads channels"]:
        """Each of the parts times its learned number, in float32 at least, and rounded once."""
        scale = HeadScales(self.param_dtype, name="head_scales")(self.num_heads)
        wide = widened(heads)
        return (scale.astype(wide.dtype)[:, None] * wide).astype(heads.dtype)

    def _context(
        self, inputs: AttentionInputs, preparation: Preparation, rules: ScoreRules, slots: Slots | None
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The values, weighted by the softmax of the scores; what is watched and what is kept goes aside."""
        watched = self.is_mutable_collection(SIGNAL) and not self.is_initializing()
        if watched or slots is not None:
            inputs, preparation = prepared(inputs, preparation), Preparation()
        q, k, v, segment_ids = inputs
        if watched:
            entropy, largest = attention_statistics(q, k, segment_ids, rules)
            self.sow(SIGNAL, "attention_entropy", entropy)
            self.sow(SIGNAL, "largest_logit", largest)
        if slots is not None:
            keys, values = self._keep("cached_key", k, slots), self._keep("cached_value", v, slots)
            if q.shape[1] == 1:
                return cached_attention(q, keys, values, first=slots.first, last=slots.next, rules=rules)
        return softmax_attention(
            q, k, v, segment_ids=segment_ids, rules=rules, preparation=preparation, backend=self.backend
        )

    def _rules(
        self, seq: int, positions: Int[Array, "batch seq"] | None, layer_window: Int[Array, ""] | None, head_dim: int
    ) -> ScoreRules:
        """What is made of the scores."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, or None")
        sinks = alibi = None
        if self.use_sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (self.num_heads,), self.param_dtype)
        if self.alibi is not None:
            alibi = self.alibi.rule(
                self.num_heads, self.dtype, default_positions(seq) if positions is None else positions
            )
        return ScoreRules(
            scale=math.sqrt(head_dim) if self.sphere and self.score_scale is None else self.score_scale,
            cap=self.score_cap,
            causal=self.causal,
            window=self.window if layer_window is None else None,
            layer_window=layer_window,
            sinks=sinks,
            alibi=alibi,
        )

    def _keep(self, name: str, new: Float[Array, "batch seq kv_heads head_dim"], slots: Slots) -> CachedHeads:
        """Put new keys or values into their slots; returns all slots of this layer."""
        kept: nn.Variable[CachedHeads] = self.variable(CACHE, name)
        new = jnp.moveaxis(new, 1, 3)
        kept.value = in_place(jax.lax.dynamic_update_slice_in_dim(kept.value, new, slots.next, axis=3))
        return kept.value

    def _sizes(self, embed: int) -> tuple[int, int]:
        """(num_kv_heads, head_dim)."""
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_at_least_one("num_heads", self.num_heads)
        check_at_least_one("num_kv_heads", num_kv_heads)
        if self.num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads}: must divide num_heads={self.num_heads}")
        if self.head_dim is None and embed % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide the width of x, {embed}, or set head_dim")
        return num_kv_heads, embed // self.num_heads if self.head_dim is None else self.head_dim

    def _rotation(self, seq: int, head_dim: int, positions: Int[Array, "batch seq"] | None) -> Rotation | None:
        if self.rope_theta is None:
            if positions is not None and self.alibi is None:
                raise ValueError("positions: nothing here reads them, because nothing rotates (rope_theta=None)")
            if self.rotary_dim is not None:
                raise ValueError(f"rotary_dim={self.rotary_dim}: nothing rotates without rope_theta")
            return None
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim={rotary_dim}: must be even, and at most head_dim={head_dim}")
        positions = default_positions(seq) if positions is None else positions
        return rotation(positions, rotary_dim, self.rope_theta, self.dtype)

    def _norm_of_heads(
        self, name: str, heads: Float[Array, "batch seq heads head_dim"]
    ) -> tuple[Float[Array, "batch seq heads head_dim"], HeadNorm | None]:
        """The heads, and the norm that is still to be applied; a norm over the projection is applied here."""
        if getattr(self, name) != "head" or self.norm_per_head or not self._is_for_kernels:
            return self._normalize(name, heads), None
        parameters = HeadNormParameters(
            use_scale=self.norm_scale,
            use_bias=self.norm_bias,
            scale_plus_one=self.norm_scale_plus_one,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
        scale, bias = parameters(heads.shape[-1])
        return heads, HeadNorm(scale, bias, NORM_KINDS[self.norm].callable, self.norm_epsilon)

    @property
    def _is_for_kernels(self) -> bool:
        """Whether kernels can apply norms of this kind; an unknown kind is refused by Norm."""
        return self.norm in NORM_KINDS and NORM_KINDS[self.norm].in_kernels

    def _normalize(
        self, name: str, heads: Float[Array, "batch seq heads head_dim"]
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The norm of this name where the placement has it, otherwise heads as they are."""
        extent: placement.HeadNorm = getattr(self, name)
        if extent is None:
            return heads
        if extent not in ("head", "projection"):
            raise ValueError(f"{name}={extent!r}: must be None, 'head' or 'projection'")
        norm = Norm(
            kind=self.norm,
            epsilon=self.norm_epsilon,
            use_scale=self.norm_scale,
            use_bias=self.norm_bias,
            scale_plus_one=self.norm_scale_plus_one,
            starts=self.norm_starts,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            feature_axes=(-2, -1) if extent == "head" and self.norm_per_head else -1,
            name=name,
        )
        if extent == "head":
            return norm(heads)
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
