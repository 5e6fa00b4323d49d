"""The keys of norms, which ModelConfig has."""

import dataclasses
from typing import Literal

from hybridnorm_jax.config_fields import Filled, check_choice, key
from hybridnorm_jax.model.config_attention import AttentionKeys
from hybridnorm_jax.model.config_sizes import WIDEST
from hybridnorm_jax.model.norm_kinds import NORM_KINDS, NormKind
from hybridnorm_jax.model.placement import HEAD_NORMS, BlockPlacement, SideStream
from hybridnorm_jax.model.schemes import SCHEMES, Scheme

# Where a norm stands, in the order of the numbers of norm_alpha and norm_shift.
NormPlace = Literal["attention", "feed_forward", "outside"]
NORM_PLACES = ("attention", "feed_forward", "outside")


@dataclasses.dataclass(frozen=True)
class NormKeys(AttentionKeys):
    """What the norms are, and what the scheme says of those outside the blocks."""

    norm: str = key("rmsnorm", f"kind of the norms, a name in hybridnorm_jax.NORM_KINDS: {' | '.join(NORM_KINDS)}")
    norm_alpha: tuple[float, ...] = key(
        (),
        "what alpha of dyt and derf starts at: [at attention, at the feed-forward layer, outside the blocks], or one "
        "number for all; []: 0.5",
        at_least=-1000,
        at_most=1000,
    )
    norm_shift: tuple[float, ...] = key(
        (), "what shift of derf starts at, as norm_alpha; []: 0", at_least=-1000, at_most=1000
    )
    learned_embedding_scale: bool = key(
        False,
        "the embedding, with its positions, is times a learned number, which starts at sqrt(d_model) (DyT, Derf)",
    )
    attention_norm: str = key(
        "auto",
        "norm on q, k, v, context, in the FFN: auto (norm; rmsnorm for crmsnorm and gated) | a kind as in model.norm",
    )
    norm_eps: float = key(1e-5, "added to the mean square inside the root, in every norm", at_least=0, at_most=1)
    norm_scale: bool = key(True, "norms have a learned scale")
    norm_scale_plus_one: bool = key(False, "norms multiply by 1 + scale, and scales start at 0 (Gemma, Nemotron)")
    norm_bias: bool = key(False, "norms have a learned bias")
    norm_width: int | None = key(
        None,
        "crmsnorm: length of the zero-mean vector whose last element is not stored; null: d_model + 1",
        at_least=2,
        at_most=WIDEST + 1,
    )
    attention_norm_scale: Filled[bool] = key(
        None, "norm_scale of the norms on q, k, v, context and inside the FFN; null: norm_scale"
    )
    attention_norm_bias: Filled[bool] = key(
        None, "norm_bias of the norms on q, k, v, context and inside the FFN; null: norm_bias"
    )
    attention_norm_per_head: bool = key(False, "norms over a head have a scale and a bias for each head")
    embedding_norm: str = key("auto", "norm after the embedding: auto (as the scheme says) | true | false")
    outer_norm_scale: Filled[bool] = key(None, "norm_scale of the norms outside the blocks; null: norm_scale")
    outer_norm_bias: Filled[bool] = key(None, "norm_bias of the norms outside the blocks; null: norm_bias")
    whole_outside: bool = key(
        False,
        "norm=crmsnorm: outside the blocks vectors are whole, of norm_width elements; norms are RMSNorm there",
    )
    embedding_centring: bool = key(False, "the mean over the channels is subtracted before the first block")

    def _check_names_of_norms(self) -> None:
        of_heads = ("auto", *(name for name, kind in NORM_KINDS.items() if kind.for_heads))
        check_choice("model.norm", self.norm, NORM_KINDS)
        check_choice("model.attention_norm", self.attention_norm, of_heads)
        check_choice("model.embedding_norm", self.embedding_norm, ("auto", "true", "false"))

    def _fill_norms(self) -> None:
        """Replace null by the value it stands for, so that every reader sees plain values."""
        if self.attention_norm_scale is None:
            self._fill("attention_norm_scale", self.norm_scale)
        if self.attention_norm_bias is None:
            self._fill("attention_norm_bias", self.norm_bias)
        if self.outer_norm_scale is None:
            self._fill("outer_norm_scale", self.norm_scale)
        if self.outer_norm_bias is None:
            self._fill("outer_norm_bias", self.norm_bias)

    def _check_norms(self) -> None:
        width, stored = self.norm_width, self.d_model
        if width is not None:
            self._check("norm_width", self.norm_kind.drops_last, "only for model.norm=crmsnorm")
            right = f"must be at most model.d_model={stored} and the one element that is not stored"
            self._check("norm_width", width <= stored + 1, right)
        extents = {getattr(placement, name) for placement in self._blocks for name in HEAD_NORMS} - {None}
        right = f"only where norms of q, k, v or context are over a head; model.scheme={self.scheme} has no such"
        self._check("attention_norm_per_head", extents == {"head"} or not self.attention_norm_per_head, right)
        right = f"norms of the kind {self.attention_norm_kind} have matrices over a head's channels, one for all heads"
        is_one = NORM_KINDS[self.attention_norm_kind].has_wide_matrices
        self._check("attention_norm_per_head", not (is_one and self.attention_norm_per_head), right)
        has_scale = self.norm_scale or self.has_scales_elsewhere
        self._check("norm_scale_plus_one", has_scale or not self.norm_scale_plus_one, "norms have no scale")
        right = f"model.scheme={self.scheme} has no norms outside its blocks"
        for name, usual in (("outer_norm_scale", self.norm_scale), ("outer_norm_bias", self.norm_bias)):
            self._check(name, self.has_outer_norms or getattr(self, name) == usual, right)
        is_stored = self.norm_kind.drops_last
        self._check("whole_outside", is_stored or not self.whole_outside, "only for model.norm=crmsnorm")
        right = "model.norm=crmsnorm needs model.whole_outside: what is stored of a vector has not its mean"
        has_means = self.whole_outside or not is_stored
        self._check("embedding_centring", has_means or not self.embedding_centring, right)

    def _check_norm_starts(self) -> None:
        kinds = [self.norm, self.attention_norm_kind] if self.has_norms_in_branches else [self.norm]
        names = {name for kind in kinds for name in NORM_KINDS[kind].parameter_names}
        for name in ("alpha", "shift"):
            starts = getattr(self, f"norm_{name}")
            right = f"this model has no norm with {name}: its norms are {' and '.join(dict.fromkeys(kinds))}"
            self._check(f"norm_{name}", name in names or not starts, right)
            right = "must be one number, or three: at attention, at the feed-forward layer, outside the blocks"
            self._check(f"norm_{name}", len(starts) in (0, 1, len(NORM_PLACES)), right)

    def norm_starts(self, place: NormPlace, kind: str) -> dict[str, float]:
        """What norm_alpha and norm_shift say of a norm of this kind at this place, by the parameter's name."""
        found: dict[str, float] = {}
        for name in ("alpha", "shift"):
            starts = getattr(self, f"norm_{name}")
            if starts and name in NORM_KINDS[kind].parameter_names:
                found[name] = starts[0] if len(starts) == 1 else starts[NORM_PLACES.index(place)]
        return found

    @property
    def norm_kind(self) -> NormKind:
        """The kind of the norms on the stream, inside the blocks."""
        return NORM_KINDS[self.norm]

    @property
    def attention_norm_kind(self) -> str:
        """The kind of the norms on q, k, v and context: that of the stream, where it is one for heads."""
        auto = self.norm if self.norm_kind.for_heads else "rmsnorm"
        return auto if self.attention_norm == "auto" else self.attention_norm

    @property
    def has_norms_in_branches(self) -> bool:
        """Whether there are norms of attention_norm: on q, k, v, the context or inside the feed-forward layer."""
        on_heads = any(getattr(placement, name) is not None for placement in self._blocks for name in HEAD_NORMS)
        return on_heads or any(placement.normalizes_hidden for placement in self._blocks)

    @property
    def has_scales_elsewhere(self) -> bool:
        """Whether other norms than those of norm_scale have scales."""
        return self.attention_norm_scale or self.outer_norm_scale

    @property
    def has_outer_norms(self) -> bool:
        """Whether norms stand outside the blocks."""
        return self.has_embedding_norm or self.has_final_norm or self.side_stream is not None

    @property
    def whole_width(self) -> int:
        """Channels outside the blocks: of the embedding, and of what the last norm and the head read."""
        if not self.whole_outside:
            return self.d_model
        return self.d_model + 1 if self.norm_width is None else self.norm_width

    @property
    def outer_norm(self) -> str:
        """The kind of the norms outside the blocks: of the embedding, and before the head."""
        return "rmsnorm" if self.whole_outside else self.norm

    @property
    def scheme_rule(self) -> Scheme:
        """The Scheme this model follows."""
        return SCHEMES[self.scheme]

    @property
    def _blocks(self) -> tuple[BlockPlacement, ...]:
        """The placement of every layer, of which only what is present counts here."""
        return self.scheme_rule.placements(self.num_layers)

    @property
    def has_embedding_norm(self) -> bool:
        """Whether a norm follows the embedding."""
        return self.scheme_rule.embedding_norm if self.embedding_norm == "auto" else self.embedding_norm == "true"

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm precedes the head."""
        return self.scheme_rule.final_norm

    @property
    def side_stream(self) -> SideStream | None:
        """How the second stream begins and ends, where the scheme has one."""
        return self.scheme_rule.side_stream
