"""The keys of attention and of positions, which ModelConfig has."""

import dataclasses
import math

from hybridnorm_jax.config_fields import check_choice, key
from hybridnorm_jax.kernels.backend_names import features_of
from hybridnorm_jax.model.config_feed_forward import FeedForwardKeys
from hybridnorm_jax.model.config_sizes import LONGEST_CONTEXT, WIDEST

POSITIONS = ("rope", "learned", "sinusoidal", "alibi")
# Those that are rows of a table, which are added to the token embedding.
TABLES = ("learned", "sinusoidal")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")
# Values of rope_layers.
NO_ROTATION, FIRST_ROTATION, SECOND_ROTATION = 0, 1, 2
LARGEST_THETA = 1e12


@dataclasses.dataclass(frozen=True)
class AttentionKeys(FeedForwardKeys):
    """What attention computes, and how it knows positions."""

    attention_bias: bool = key(False, "q, k, v and output projections have biases")
    attention_output_bias: bool | None = key(None, "attention's output projection has a bias; null: attention_bias")
    attention_scale: float | None = key(
        None, "factor of q k^T; null: 1/sqrt(head_dim), or as base_head_dim says", above=0, at_most=1e6
    )
    base_head_dim: int | None = key(
        None,
        "muP: q k^T is multiplied by sqrt(base_head_dim)/head_dim, for heads that grow with the width (docs/widths.md)",
        at_least=1,
        at_most=WIDEST,
    )
    score_cap: float | None = key(
        None, "attention's scores s become cap * tanh(s / cap); null: no cap", above=0, at_most=1e6
    )
    qkv_clip: float | None = key(
        None, "q, k, v are clipped to [-clip, clip] after their projections; null: they are not", above=0, at_most=1e6
    )
    attention_sinks: bool = key(False, "the softmax of each head has one more term exp(sink), a learned number")
    windows: tuple[int, ...] = key(
        (),
        "of each layer: how many positions a token sees, its own and those just before; 0: all. A shorter list "
        "repeats; []: all see everything",
        at_least=0,
        at_most=LONGEST_CONTEXT,
    )
    positions: str = key("rope", " | ".join(POSITIONS))
    rope_theta: float = key(10000.0, "base of the rotary wavelengths", at_least=1, at_most=LARGEST_THETA)
    rotary_dim: int | None = key(None, "leading channels of a head that rotate; null: all", at_least=2, at_most=WIDEST)
    rope_scaling: str = key("none", f"how wavelengths are stretched for longer texts: {' | '.join(ROPE_SCALINGS)}")
    rope_factor: float = key(1.0, "rope_scaling: by how much", at_least=1, at_most=1e6)
    rope_original_length: int | None = key(
        None,
        "rope_scaling llama3, yarn, longrope: positions before it was stretched",
        at_least=1,
        at_most=LONGEST_CONTEXT,
    )
    rope_bounds: tuple[float, ...] = key(
        (),
        "rope_scaling llama3: [low_freq_factor, high_freq_factor]; yarn: [beta_slow, beta_fast]",
        above=0,
        at_most=1e6,
    )
    rope_attention_factor: float | None = key(
        None, "rope_scaling yarn, longrope: factor of cos and sin; null: as the method derives it", above=0, at_most=1e6
    )
    rope_truncate: bool = key(True, "rope_scaling yarn: its two bounds are rounded to whole channels")
    rope_short_factors: tuple[float, ...] = key(
        (), "longrope: factors of the wavelengths up to rope_original_length", above=0, at_most=1e6
    )
    rope_long_factors: tuple[float, ...] = key(
        (), "longrope: factors of the wavelengths beyond rope_original_length", above=0, at_most=1e6
    )
    rope_layers: tuple[int, ...] = key(
        (),
        "rotation of each layer: 1 by rope_theta and rope_scaling, 2 by second_rope_theta, 0 none. A shorter list "
        "repeats; []: 1 everywhere",
        at_least=0,
        at_most=2,
    )
    second_rope_theta: float | None = key(
        None, "base of the wavelengths of layers with rope_layers 2", at_least=1, at_most=LARGEST_THETA
    )
    max_positions: int | None = key(
        None,
        "rows of the table of positions, learned or sinusoidal; null with rope and alibi",
        at_least=1,
        at_most=LONGEST_CONTEXT,
    )
    position_offset: int = key(
        0, "rows of the position table before position 0 (OPT has 2)", at_least=0, at_most=LONGEST_CONTEXT
    )
    alibi_max: float = key(8.0, "ALiBi: slopes are 2^(-alibi_max h / heads), h = 1, ...", above=0, at_most=1000)
    alibi_scale: float = key(1.0, "ALiBi: factor of what is added to the scores", above=0, at_most=1e6)
    alibi_bfloat16: bool = key(
        False, "ALiBi: slopes and their products with positions are rounded to bfloat16 (Falcon)"
    )

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """How many positions a token sees in each layer; 0: all."""
        return self._by_layer(self.windows, 0)

    @property
    def layer_rotations(self) -> tuple[int, ...]:
        """The rotation of each layer: FIRST_ROTATION, SECOND_ROTATION or NO_ROTATION."""
        if self.positions != "rope":
            return (NO_ROTATION,) * self.num_layers
        return self._by_layer(self.rope_layers, FIRST_ROTATION)

    @property
    def is_causal(self) -> bool:
        """Whether a token sees no later ones."""
        return True

    @property
    def has_position_table(self) -> bool:
        """Whether rows of a table say where tokens stand."""
        return self.positions in TABLES

    def score_features(self, seq: int) -> tuple[str, ...]:
        """What a kernel must be able to do besides causal attention, by the names of kernels.backend_names.FEATURES.

        Args:
          seq: length of the sequences; wider windows hide nothing of them.
        """
        return features_of(
            causal=self.is_causal,
            windows=any(0 < window < seq for window in self.layer_windows),
            cap=self.score_cap is not None,
            sinks=self.attention_sinks,
            alibi=self.positions == "alibi",
        )

    @property
    def score_scale(self) -> float:
        """The factor of q k^T."""
        return 1 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def length_of_short_factors(self) -> int | None:
        """A text longer than this is rotated otherwise from its first token on (longrope); None: no such length."""
        return self.rope_original_length if self.rope_scaling == "longrope" else None

    @property
    def rotary_width(self) -> int:
        """How many of head_dim's leading channels rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def _check_positions(self) -> None:
        check_choice("model.positions", self.positions, POSITIONS)
        check_choice("model.rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        for name in ("windows", "rope_layers"):
            fits = len(getattr(self, name)) <= self.num_layers
            self._check(name, fits, f"must have at most model.num_layers={self.num_layers} numbers")
        self._check_tables()
        self._check_alibi()
        self._check_rotation()
        self._check_rope_scaling()

    def _check_tables(self) -> None:
        only = "only for positions=rope"
        self._check("rotary_dim", self.positions == "rope" or self.rotary_dim is None, only)
        has_table = self.has_position_table
        right = f"positions={self.positions} needs a number" if has_table else f"only for positions={', '.join(TABLES)}"
        self._check("max_positions", (self.max_positions is not None) == has_table, right)
        self._check("position_offset", has_table or self.position_offset == 0, right)
        right = "positions=sinusoidal needs at least 4 channels"
        self._check("d_model", self.positions != "sinusoidal" or self.d_model >= 4, right)

    def _check_alibi(self) -> None:
        if self.positions != "alibi":
            only = "only for positions=alibi"
            self._check("alibi_max", self.alibi_max == 8, only)
            self._check("alibi_scale", self.alibi_scale == 1, only)
            self._check("alibi_bfloat16", not self.alibi_bfloat16, only)

    def _check_rotation(self) -> None:
        only = "only for positions=rope"
        rotates = self.positions == "rope"
        for name in ("rope_layers", "second_rope_theta", "rope_short_factors", "rope_long_factors", "rope_bounds"):
            self._check(name, rotates or not getattr(self, name), only)
        self._check("rope_scaling", rotates or self.rope_scaling == "none", only)
        if rotates:
            right = f"rope rotates pairs, so it must be an even number, at most model.head_dim={self.head_dim}"
            self._check("rotary_dim", self.rotary_width % 2 == 0 and self.rotary_width <= self.head_dim, right)
            has_second = SECOND_ROTATION in self.layer_rotations
            right = "set it where model.rope_layers has 2, and only there"
            self._check("second_rope_theta", (self.second_rope_theta is not None) == has_second, right)

    def _check_rope_scaling(self) -> None:
        kind = self.rope_scaling
        self._check("rope_factor", kind != "none" or self.rope_factor == 1, "only with model.rope_scaling")
        needs_length = kind in ("llama3", "yarn", "longrope")
        right = f"model.rope_scaling={kind} {'needs a number' if needs_length else 'has none'}"
        self._check("rope_original_length", (self.rope_original_length is not None) == needs_length, right)
        right = f"model.rope_scaling={kind} divides by its logarithm, so it must be above 1"
        self._check("rope_original_length", kind != "longrope" or self.rope_original_length != 1, right)
        self._check("rope_theta", kind != "yarn" or self.rope_theta > 1, right)
        needs_bounds = kind in ("llama3", "yarn")
        right = f"model.rope_scaling={kind} {'needs two numbers, the smaller first' if needs_bounds else 'has none'}"
        bounds = self.rope_bounds
        fits = len(bounds) == 2 and bounds[0] < bounds[1] if needs_bounds else not bounds
        self._check("rope_bounds", fits, right)
        self._check("rope_truncate", kind == "yarn" or self.rope_truncate, "only for model.rope_scaling=yarn")
        has_factor = kind in ("yarn", "longrope") or self.rope_attention_factor is None
        self._check("rope_attention_factor", has_factor, "only for model.rope_scaling=yarn or longrope")
        count = self.rotary_width // 2 if kind == "longrope" else 0
        for name in ("rope_short_factors", "rope_long_factors"):
            right = (
                f"model.rope_scaling={kind} needs {count} numbers: model.rotary_dim / 2"
                if count
                else "only for longrope"
            )
            self._check(name, len(getattr(self, name)) == count, right)
