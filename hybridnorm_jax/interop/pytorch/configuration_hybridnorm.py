"""The configuration of a HybridNorm model for transformers: its sizes, and as data where every layer normalizes."""

import transformers
from transformers import PretrainedConfig

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"HybridNorm models need transformers 5 or newer; this is {transformers.__version__}")

# What a sublayer's placement may say. A part that it does not state has the first of these values; None: any number.
SUBLAYER = {
    "pre": (False, True),
    "branch": (False, True),
    "post": (False, True),
    "residual": ("input", "block", "both"),
    "reads": ("input", "block"),
    "residual_scale": None,
    "branch_scale": None,
    "input_scale": None,
    "branch_norm_init": None,
    "pre_norm_init": None,
    "layer_scale": (None, "channel", "scalar"),
    "layer_scale_init": None,
    "residual_vector": (False, True),
    "entry": (False, True),
    "side": (None, "written", "read"),
    "side_own": ("whole", "vector", "norm"),
    "side_scale": None,
    "branch_ramp": (None,),  # branches that grow do not grow here
    "joins": ("sum", "chord", "geodesic"),
}
# What a second stream's two ends may say, and what it means where they do not.
SIDE_STREAM = {"start_scale": 1.0, "main_scale": 1.0, "main_norm": False, "side_norm_eps": None}
PRE = {"attention": {"pre": True}, "feed_forward": {"pre": True}}
HEAD_NORMS = ("q_norm", "k_norm", "v_norm", "context_norm")
EXTENTS = (None, "head", "projection")
HIDDEN_NORMS = ("gate_norm", "up_norm", "hidden_norm")
SWITCHES = ("shared_pre_norm", "shared_layer_scale", "sphere", *HIDDEN_NORMS)
HEAD_SCALES = (None, "before", "after")
PARTS = ("attention", "feed_forward", *HEAD_NORMS, "head_scales", *SWITCHES)
GATED = ("swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "geglu_quick", "reglu", "reglu_squared")
CHOICES = {
    "hidden_act": (*GATED, "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "silu"),
    "norm": ("rmsnorm", "layernorm", "crmsnorm", "dyt", "derf", "bhyt", "gated"),
    "attention_norm": ("rmsnorm", "layernorm", "dyt", "derf", "bhyt"),
    "positions": ("rope", "learned", "sinusoidal", "alibi"),
    "rotary_scaling": ("none", "linear", "llama3", "yarn", "longrope"),
}

# What a key means that is not stated.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "intermediate_size": 2048,
    "placements": [PRE] * 12,
    "scheme": None,
    "final_norm": True,
    "side_stream": None,
    "sphere": False,
    "embedding_norm": False,
    "hidden_act": "swiglu",
    "norm": "rmsnorm",
    "attention_norm": "rmsnorm",
    "norm_eps": 1e-5,
    "norm_scale": True,
    "norm_bias": False,
    "norm_width": None,
    "norm_scale_plus_one": False,
    "attention_norm_scale": True,
    "attention_norm_bias": False,
    "attention_norm_per_head": False,
    "outer_norm_scale": None,
    "outer_norm_bias": None,
    "whole_outside": False,
    "embedding_centring": False,
    "layer_scale": False,
    "positions": "rope",
    "rotary_base": 10000.0,
    "rotary_dim": 64,
    "rotary_layers": [],
    "second_rotary_base": None,
    "rotary_scaling": "none",
    "rotary_factor": 1.0,
    "rotary_original_length": None,
    "rotary_bounds": [],
    "rotary_attention_factor": None,
    "rotary_truncate": True,
    "rotary_short_factors": [],
    "rotary_long_factors": [],
    "max_position_embeddings": None,
    "position_offset": 0,
    "alibi_max": 8.0,
    "alibi_scale": 1.0,
    "alibi_bfloat16": False,
    "attention_windows": [],
    "attention_scale": None,
    "score_cap": None,
    "qkv_clip": None,
    "attention_sinks": False,
    "num_experts": 0,
    "num_experts_per_tok": None,
    "norm_topk_prob": False,
    "num_shared_experts": 0,
    "shared_intermediate_size": None,
    "shared_expert_gate": False,
    "shared_expert_gate_bias": False,
    "balance_bias": False,
    "dense_layers": [],
    "dense_intermediate_size": None,
    "clamp_limit": 7.0,
    "clamp_alpha": 1.702,
    "attention_bias": False,
    "attention_output_bias": None,
    "mlp_bias": False,
    "mlp_output_bias": None,
    "router_bias": None,
    "head_bias": False,
    "embedding_scale": None,
    "learned_embedding_scale": False,
    "branch_multiplier": 1.0,
    "ramp_steps": None,
    "ramp_at": None,
    "logits_scale": None,
    "logits_cap": None,
    "dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
# Some versions of transformers set these in their own __init__ only where they are given.
DEFAULTS_OF_TRANSFORMERS = {
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class HybridNormConfig(PretrainedConfig):
    """A decoder. Every sublayer computes

        y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x))))

    and `placements` says for each layer which parts it has.

    No default follows from another value: transformers leaves out of config.json what is as it is by default.

    Args:
      placements: of each layer a mapping: `attention` and `feed_forward` with parts of SUBLAYER, of which those that
        are not stated are absent (a norm), "input", or 1 (a scale); `q_norm`, `k_norm`, `v_norm` and `context_norm`
        are "head", "projection" or absent. `shared_pre_norm`: the feed-forward layer reads what the attention's pre
        norm gives, and has none of its own. `gate_norm`, `up_norm`, `hidden_norm`: norms over the hidden width of what
        the feed-forward layer's projections give, and of what its last one reads. `head_scales`: a learned weight for
        each head, "before" or "after" the output projection. `shared_layer_scale`: both branches have one layer_scale.
        `sphere`: q and k have length 1 and learned scales, and so have gate and up; see attention_hybridnorm.py and
        feed_forward_hybridnorm.py. `joins`: "chord" and "geodesic", in the place of a "sum", in sphere_hybridnorm.py.
      side_stream: where the placements have a second stream, `side`, a mapping with keys of SIDE_STREAM: it begins as
        start_scale times the first one, and behind the last layer main_scale * x + N(side) is left, or with main_norm
        main_scale * N(x) + N(side); side_norm_eps is norm_eps of N(side). null: there is none.
      sphere: every logit is multiplied by a learned number (nGPT). Nothing here keeps matrices at length 1 in training.
      scheme: the name of the placements in hybridnorm_jax; nothing here reads it.
      final_norm, embedding_norm: whether a norm stands before the head, and after the embedding.
      hidden_act: a name of CHOICES; those of GATED have a gate. "gelu" is the exact one.
      clamp_limit, clamp_alpha: of "swiglu_clamped", see gated in feed_forward_hybridnorm.py.
      norm, attention_norm: the kind of the norms on the stream, and on q, k, v, the context and inside the
        feed-forward layer; a name of CHOICES. norms_hybridnorm.py has the formulas.
      norm_scale, norm_bias, attention_norm_scale, attention_norm_bias: whether these norms have a learned scale, bias.
      norm_eps: added inside the root of every norm.
      norm_width: of crmsnorm: length of the zero-mean vector whose last element is not stored.
      norm_scale_plus_one: norms multiply by 1 + weight.
      attention_norm_per_head: norms over a head have a weight and a bias for each head.
      outer_norm_scale, outer_norm_bias: norm_scale and norm_bias of the norms outside the blocks; null: as these.
      whole_outside: of crmsnorm: outside the blocks vectors are whole, of norm_width elements; norms are RMSNorm there.
      embedding_centring: the mean over the channels is subtracted before the first block.
      layer_scale: what a branch adds is multiplied by a learned weight per channel, whatever `placements` say.
      positions: "rope", "learned", "sinusoidal" or "alibi".
      rotary_base, rotary_dim: base of the wavelengths, and how many leading channels of a head rotate.
      rotary_layers, second_rotary_base: the rotation of each layer: 1 the first, by rotary_base and rotary_scaling; 2
        by second_rotary_base; 0 none. A shorter list repeats; []: 1 everywhere.
      rotary_scaling, rotary_factor, rotary_original_length, rotary_bounds, rotary_attention_factor, rotary_truncate,
        rotary_short_factors, rotary_long_factors: how wavelengths are stretched; see positions_hybridnorm.py.
      max_position_embeddings: rows there are of a table of positions; otherwise a hint that nothing here reads.
      position_offset: rows of the table of positions before position 0.
      alibi_max, alibi_scale, alibi_bfloat16: see alibi_bias in positions_hybridnorm.py.
      attention_windows: how many tokens a token sees in each layer, its own and those just before; 0: all. A shorter
        list repeats; []: all.
      attention_scale: factor of q k^T; null: 1/sqrt(head_dim).
      score_cap: scores s become cap * tanh(s / cap); null: they do not.
      qkv_clip: q, k, v are clipped to [-clip, clip] after their projections; null: they are not.
      attention_sinks: the softmax of each head has one more term exp(sink).
      num_experts: 0: the feed-forward layers are dense.
      num_experts_per_tok, norm_topk_prob, num_shared_experts, balance_bias, shared_expert_gate,
        shared_expert_gate_bias: see feed_forward_hybridnorm.py.
      shared_intermediate_size: width of the shared experts together; null: num_shared_experts * intermediate_size.
      dense_layers, dense_intermediate_size: layers without experts, and their width; null: intermediate_size.
      attention_bias, mlp_bias, head_bias: whether these projections have biases.
      attention_output_bias, mlp_output_bias, router_bias: whether these have one; null: as attention_bias, mlp_bias.
      embedding_scale: factor of the token embedding, before positions are added; null: 1.
      learned_embedding_scale: the embedding, with its positions, is times a learned number.
      branch_multiplier, ramp_steps, ramp_at: factors of branch_scale that are in `placements` already; nothing here
        reads them.
      logits_scale, logits_cap: factor of the logits z, which then become cap * tanh(z / cap); null: neither.
      dropout: after the embedding and after every branch, in training.
      initializer_range: standard deviation of weights that are in no checkpoint.
    """

    model_type = "hybridnorm"
    defaults = DEFAULTS  # an encoder has others
    causal = True
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - the Trainer adds a list to it

    def __init__(self, **keys):
        for name, default in self.defaults.items():
            value = keys.pop(name, default)
            if isinstance(default, list):  # null means it, too
                value = list(default if value is None else value)
            setattr(self, name, value)
        inherited = {name: keys.pop(name, default) for name, default in DEFAULTS_OF_TRANSFORMERS.items()}
        super().__init__(**inherited, **keys)
        for name, value in inherited.items():
            setattr(self, name, value)

    # What follows from several values. transformers writes attributes alone, so these are never in a config.json.

    @property
    def score_scale(self):
        """The factor of q k^T."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def scores_need_eager(self):
        """Whether torch's scaled_dot_product_attention cannot compute these scores."""
        return self.score_cap is not None or self.attention_sinks

    @property
    def layer_windows(self):
        """How many tokens a token sees in each layer; 0: all."""
        return by_layer(self.attention_windows, 0, self.num_hidden_layers)

    @property
    def layer_rotations(self):
        """The rotation of each layer, as rotary_layers says it."""
        return by_layer(self.rotary_layers, 1, self.num_hidden_layers)

    @property
    def has_attention_output_bias(self):
        """Whether the last projection of attention has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_mlp_output_bias(self):
        """Whether the last projection of a feed-forward layer has a bias."""
        return self.mlp_bias if self.mlp_output_bias is None else self.mlp_output_bias

    @property
    def has_router_bias(self):
        """Whether the router has a bias."""
        return self.mlp_bias if self.router_bias is None else self.router_bias

    @property
    def shared_width(self):
        """The width of the shared experts together."""
        together = self.num_shared_experts * self.intermediate_size
        return together if self.shared_intermediate_size is None else self.shared_intermediate_size

    @property
    def dense_width(self):
        """The width of layers without experts."""
        return self.intermediate_size if self.dense_intermediate_size is None else self.dense_intermediate_size

    @property
    def whole_width(self):
        """Channels outside the blocks."""
        if not self.whole_outside:
            return self.hidden_size
        return self.hidden_size + 1 if self.norm_width is None else self.norm_width

    @property
    def outer_norm(self):
        """The kind of the norms outside the blocks."""
        return "rmsnorm" if self.whole_outside else self.norm

    @property
    def has_outer_norm_scale(self):
        """Whether norms outside the blocks have a learned scale."""
        return self.norm_scale if self.outer_norm_scale is None else self.outer_norm_scale

    @property
    def has_outer_norm_bias(self):
        """Whether norms outside the blocks have a learned bias."""
        return self.norm_bias if self.outer_norm_bias is None else self.outer_norm_bias

    def check(self):
        """Raise ValueError for a value that the model would misread; the message names it. The model calls this."""
        for name, known in CHOICES.items():
            require(name, getattr(self, name), known)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads")
        if self.positions in ("learned", "sinusoidal") and self.max_position_embeddings is None:
            raise ValueError(f"max_position_embeddings=null: positions={self.positions} needs a number")
        if self.whole_outside and self.norm != "crmsnorm":
            raise ValueError("whole_outside=True: needs norm=crmsnorm")
        if self.embedding_centring and self.norm == "crmsnorm" and not self.whole_outside:
            raise ValueError("embedding_centring=True: with norm=crmsnorm needs whole_outside")
        if 2 in self.layer_rotations and self.second_rotary_base is None:
            raise ValueError("second_rotary_base=null: rotary_layers has 2, which needs a number")
        if self.num_experts and self.hidden_act not in ("swiglu", "swiglu_clamped"):
            raise ValueError(f"hidden_act={self.hidden_act!r}: experts have swiglu or swiglu_clamped")
        if self.hidden_act == "swiglu_clamped" and self.clamp_limit <= 0:
            raise ValueError(f"clamp_limit={self.clamp_limit}: must be above 0")
        if self.num_experts and not 1 <= (self.num_experts_per_tok or 0) <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: must be between 1 and num_experts")
        if len(self.placements) != self.num_hidden_layers:
            raise ValueError(f"placements: {len(self.placements)} of them for {self.num_hidden_layers} layers")
        for layer, placement in enumerate(self.placements):
            for name, value in placement.items():
                where = f"placements[{layer}].{name}"
                if name in ("attention", "feed_forward"):
                    check_sublayer(where, value)
                elif name in HEAD_NORMS:
                    require(where, value, EXTENTS)
                elif name == "head_scales":
                    require(where, value, HEAD_SCALES)
                elif name in SWITCHES:
                    require(where, value, (False, True))
                else:
                    raise ValueError(f"{where}: not known; known: {', '.join(PARTS)}")
        for layer, placement in enumerate(self.placements):
            for name in ("attention", "feed_forward"):
                if (placement.get(name, {}).get("side") is None) != (self.side_stream is None):
                    raise ValueError(f"placements[{layer}].{name}.side: must be stated where side_stream is, not else")
        for key in self.side_stream or ():
            require("side_stream: its key", key, SIDE_STREAM)
        if self._attn_implementation not in (None, "sdpa"):
            raise ValueError(f"attn_implementation={self._attn_implementation!r}: this model has sdpa alone")


def by_layer(pattern, otherwise, layers):
    """A number for each layer: the pattern again and again, or the same number everywhere where it is empty."""
    whole = pattern or [otherwise]
    return [whole[layer % len(whole)] for layer in range(layers)]


def check_sublayer(where, sublayer):
    """Raise ValueError for a part that no sublayer has, or a value that the part cannot have."""
    for part, value in sublayer.items():
        require(f"{where}: its part", part, SUBLAYER)
        if SUBLAYER[part] is not None:
            require(f"{where}.{part}", value, SUBLAYER[part])
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}.{part}={value!r}: must be a number")


def require(name, value, known):
    """Raise ValueError unless the value is one of those that are known."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, known))}")
