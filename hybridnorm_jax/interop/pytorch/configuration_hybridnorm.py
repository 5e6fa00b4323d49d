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
}
PRE = {"attention": {"pre": True}, "feed_forward": {"pre": True}}
HEAD_NORMS = ("q_norm", "k_norm", "v_norm", "context_norm")
EXTENTS = (None, "head", "projection")
CHOICES = {
    "hidden_act": ("swiglu", "gelu", "gelu_tanh", "relu"),
    "norm": ("rmsnorm", "layernorm", "crmsnorm"),
    "attention_norm": ("rmsnorm", "layernorm"),
    "positions": ("rope", "learned"),
}


class HybridNormConfig(PretrainedConfig):
    """A decoder. Every sublayer computes

        y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x))))

    and `placements` says for each layer which parts it has.

    No default follows from another value: transformers leaves out of config.json what is as it is by default.

    Args:
      placements: of each layer a mapping: `attention` and `feed_forward` with parts of SUBLAYER, of which those that
        are not stated are absent (a norm), "input", or 1 (a scale); `q_norm`, `k_norm`, `v_norm` and `context_norm`
        are "head", "projection" or absent.
      scheme: the name of the placements in hybridnorm_jax; nothing here reads it.
      final_norm, embedding_norm: whether a norm stands before the head, and after the embedding.
      hidden_act: "swiglu", "gelu" (exact), "gelu_tanh" or "relu".
      norm, attention_norm: the kind of the norms on the stream, and on q, k, v and the context.
      norm_scale, norm_bias, attention_norm_scale, attention_norm_bias: whether these norms have a learned scale, bias.
      norm_eps: added inside the root of every norm.
      norm_width: of crmsnorm: length of the zero-mean vector whose last element is not stored.
      positions: "rope" or "learned".
      rotary_base, rotary_dim: base of the wavelengths, and how many leading channels of a head rotate.
      max_position_embeddings: learned positions there are; with rope a hint for others, which nothing here reads.
      position_offset: rows of the table of learned positions before position 0.
      num_experts: 0: the feed-forward layers are dense.
      num_experts_per_tok, norm_topk_prob, num_shared_experts, balance_bias: see Experts in modeling_hybridnorm.py.
      attention_bias, mlp_bias, head_bias: whether these projections have biases.
      dropout: after the embedding and after every branch, in training.
      initializer_range: standard deviation of weights that are in no checkpoint.
    """

    model_type = "hybridnorm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - the Trainer adds a list to it

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        intermediate_size=2048,
        placements=None,
        scheme=None,
        final_norm=True,
        embedding_norm=False,
        hidden_act="swiglu",
        norm="rmsnorm",
        attention_norm="rmsnorm",
        norm_eps=1e-5,
        norm_scale=True,
        norm_bias=False,
        norm_width=None,
        attention_norm_scale=True,
        attention_norm_bias=False,
        positions="rope",
        rotary_base=10000.0,
        rotary_dim=64,
        max_position_embeddings=None,
        position_offset=0,
        num_experts=0,
        num_experts_per_tok=None,
        norm_topk_prob=False,
        num_shared_experts=0,
        balance_bias=False,
        attention_bias=False,
        mlp_bias=False,
        head_bias=False,
        tie_word_embeddings=False,
        dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.placements = [PRE] * 12 if placements is None else placements
        self.scheme = scheme
        self.final_norm = final_norm
        self.embedding_norm = embedding_norm
        self.hidden_act = hidden_act
        self.norm = norm
        self.attention_norm = attention_norm
        self.norm_eps = norm_eps
        self.norm_scale = norm_scale
        self.norm_bias = norm_bias
        self.norm_width = norm_width
        self.attention_norm_scale = attention_norm_scale
        self.attention_norm_bias = attention_norm_bias
        self.positions = positions
        self.rotary_base = rotary_base
        self.rotary_dim = rotary_dim
        self.max_position_embeddings = max_position_embeddings
        self.position_offset = position_offset
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.num_shared_experts = num_shared_experts
        self.balance_bias = balance_bias
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.head_bias = head_bias
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        # Some versions of transformers set these in their own __init__ only where they are given.
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id

    def check(self):
        """Raise ValueError for a value that the model would misread; the message names it. The model calls this."""
        for name, known in CHOICES.items():
            require(name, getattr(self, name), known)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads")
        if self.positions == "learned" and self.max_position_embeddings is None:
            raise ValueError("max_position_embeddings=null: positions=learned needs a number")
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
                else:
                    raise ValueError(f"{where}: not known; known: attention, feed_forward, {', '.join(HEAD_NORMS)}")
        if self._attn_implementation not in (None, "sdpa"):
            raise ValueError(f"attn_implementation={self._attn_implementation!r}: this model has sdpa alone")


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
