"""A Decoder's forward pass in NumPy and float64, written from the formulas and not from the library's code.

It reads the parameter tree of docs/parameters.md. It knows norms, placements, feed-forward layers, experts and what
stands at the two ends of a model; attention is plain and causal with RoPE over halves.
"""

import math

import numpy as np


def forward(config, params, tokens):
    """Logits (batch, seq, vocab)."""
    params = _in_float64(params)
    x = params["token_embedding"]["embedding"][tokens]
    if config.embedding_scale is not None:
        x = x * config.embedding_scale
    outer = "rmsnorm" if config.whole_outside else config.norm
    if config.has_embedding_norm:
        x = _norm(config, params.get("embedding_norm", {}), x, outer)
    if config.embedding_centring:
        x = x - x.mean(-1, keepdims=True)
    if config.whole_outside:
        x = x[..., :-1]
    ends = config.side_stream
    side = None if ends is None else ends.start_scale * x
    for layer, (placement, leaves) in enumerate(zip(config.placements, _layers(config, params), strict=True)):
        x, side = _block(config, placement, leaves, x, side, has_experts=config.has_experts[layer])
    if config.whole_outside:
        x = np.concatenate([x, -x.sum(-1, keepdims=True)], axis=-1)
    if ends is not None:
        main = _norm(config, params["streams"]["main_norm"], x) if ends.main_norm else x
        x = ends.main_scale * main + _norm(config, params["streams"]["side_norm"], side, eps=ends.side_norm_eps)
    if config.has_final_norm:
        x = _norm(config, params.get("final_norm", {}), x, outer)
    kernel = params["token_embedding"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    logits = x @ kernel + params.get("head", {}).get("bias", 0)
    if config.scheme_rule.sphere:
        logits = logits * _stored(params["head"]["scales"], x.shape[-1])
    if config.logit_scale is not None:
        logits = logits * config.logit_scale
    if config.logit_cap is not None:
        logits = config.logit_cap * np.tanh(logits / config.logit_cap)
    return logits


def _in_float64(tree):
    if isinstance(tree, dict):
        return {name: _in_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def _layers(config, params):
    """The parameters of each layer."""

    def of(tree, place):
        return {name: of(branch, place) for name, branch in tree.items()} if isinstance(tree, dict) else tree[place]

    return [of(params[f"run_{i}"], place) for i, run in enumerate(config.runs) for place in range(run.length)]


def _block(config, placement, leaves, x, side, *, has_experts):
    def attend(x):
        return _attention(config, placement, leaves["attention"], x)

    def feed_forward(x):
        if has_experts:
            return _experts(config, leaves["feed_forward"], x)
        return _feed_forward(config, leaves["feed_forward"], x, config.activation)

    if placement.shared_layer_scale:
        leaves = leaves | {"feed_forward_layer_scale": leaves["attention_layer_scale"]}
    shared = "attention_pre_norm" if placement.shared_pre_norm else "feed_forward_pre_norm"
    y, side = _sublayer(config, placement.attention, attend, leaves, x, x, side, "attention", "attention_pre_norm")
    return _sublayer(config, placement.feed_forward, feed_forward, leaves, y, x, side, "feed_forward", shared)


def _sublayer(config, part, f, leaves, x, block_input, side, name, pre_norm):
    if part.entry:
        x = _norm(config, leaves[f"{name}_entry_norm"], x)
    read = block_input if part.reads == "block" else x
    if part.side == "read":
        own = {"norm": lambda: _norm(config, leaves[f"{name}_own_norm"], read), "whole": lambda: read}
        own["vector"] = lambda: leaves[f"{name}_own_vector"]["scale"] * read
        read = own[part.side_own]() + _norm(config, leaves[f"{name}_side_norm"], side)
    residual = {"input": x, "block": block_input, "both": x + block_input}[part.residual]
    branch = f(part.input_scale * (_norm(config, leaves.get(pre_norm, {}), read) if part.pre else read))
    if part.branch:
        branch = _norm(config, leaves[f"{name}_branch_norm"], branch)
    if part.joins == "chord":
        here, there = _unit(residual), _unit(branch)
        rate = np.abs(0.05 * _stored(leaves[f"{name}_layer_scale"], x.shape[-1]))
        return _unit(here + part.branch_scale * rate * (there - here)), None
    if config.layer_scale or part.layer_scale is not None:
        branch = branch * leaves[f"{name}_layer_scale"]["scale"]
    if part.residual_vector:
        residual = residual * leaves[f"{name}_residual_vector"]["scale"]
    y = part.residual_scale * residual + part.branch_scale * branch
    if part.joins == "geodesic":
        y = _along_the_sphere(residual, part.branch_scale * branch)
    y = _norm(config, leaves[f"{name}_post_norm"], y) if part.post else y
    return y, None if part.side is None else side + part.side_scale * branch


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _stored(leaves, width):
    """Learned numbers that begin at 1 and are stored over the root of the width (nGPT, section 2.5)."""
    return leaves["scale"] * math.sqrt(width)


def _along_the_sphere(x, step):
    """A rotation of x in the plane of x and the step, by the angle that the orthogonal part of the step subtends."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    ahead = step - (step * _unit(x)).sum(-1, keepdims=True) * _unit(x)
    angle = np.linalg.norm(ahead, axis=-1, keepdims=True) / length
    return length * (_unit(x) * np.cos(angle) + _unit(ahead) * np.sin(angle))


def _norm(config, leaves, x, kind=None, eps=None):
    kind = config.norm if kind is None else kind
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    whole = np.concatenate([x, -x.sum(-1, keepdims=True)], axis=-1) if kind == "crmsnorm" else x
    y = x / np.sqrt((whole**2).mean(-1, keepdims=True) + (config.norm_eps if eps is None else eps))
    if "scale" in leaves:
        y = y * (leaves["scale"] + (1 if config.norm_scale_plus_one else 0))
    return y + leaves.get("bias", 0)


def _attention(config, placement, leaves, x):
    q, k, v = (_heads(leaves[name], x) for name in ("query", "key", "value"))
    q, k, v = (
        _head_norm(config, extent, leaves.get(f"{name}_norm", {}), heads)
        for name, extent, heads in (("q", placement.q_norm, q), ("k", placement.k_norm, k), ("v", placement.v_norm, v))
    )
    q, k = _rotated(config, q), _rotated(config, k)
    scale = 1 / math.sqrt(config.head_dim)
    if placement.sphere:
        of_keys = _stored(leaves["qk_scale"], x.shape[-1])
        of_queries = np.repeat(of_keys, config.num_heads // config.num_kv_heads, axis=0)
        q, k = _unit(q) * of_queries, _unit(k) * of_keys
        scale = math.sqrt(config.head_dim)
    groups = config.num_heads // config.num_kv_heads
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    context = np.einsum("bhqk,bkhd->bqhd", _softmax(scores), v)
    context = _head_norm(config, placement.context_norm, leaves.get("context_norm", {}), context)
    if placement.head_scales == "before":
        context = context * leaves["head_scales"]["scale"][:, None]
    y = np.einsum("bqhd,hde->bqe", context, leaves["out"]["kernel"]) + leaves["out"].get("bias", 0)
    if placement.head_scales == "after":
        y = y * np.repeat(leaves["head_scales"]["scale"], y.shape[-1] // config.num_heads)
    return y


def _heads(leaves, x):
    return np.einsum("bse,ehd->bshd", x, leaves["kernel"]) + leaves.get("bias", 0)


def _head_norm(config, extent, leaves, heads):
    if extent is None:
        return heads
    if extent == "head":
        return _norm(config, leaves, heads, config.attention_norm_kind)
    flat = heads.reshape(*heads.shape[:2], -1)
    return _norm(config, leaves, flat, config.attention_norm_kind).reshape(heads.shape)


def _rotated(config, heads):
    half = config.head_dim // 2
    angles = np.arange(heads.shape[1])[:, None] / config.rope_theta ** (np.arange(half) / half)
    turns = np.exp(1j * angles)[None, :, None, :]
    turned = (heads[..., :half] + 1j * heads[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """x Phi(x), Phi the distribution function of a normal variable."""
    return x * np.vectorize(lambda number: (1 + math.erf(number / math.sqrt(2))) / 2)(x)


def gelu_tanh(x):
    """Its approximation by tanh (1606.08415)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Names of model.activation -> the function.
FUNCTIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x),
}
GATES = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "geglu_quick": "gelu_quick",
    "reglu": "relu",
    "reglu_squared": "relu_squared",
}


def _hidden(config, activation, gated, upped):
    if activation == "swiglu_clamped":
        gated = np.minimum(gated, config.clamp_limit)
        upped = np.clip(upped, -config.clamp_limit, config.clamp_limit)
        return gated * sigmoid(config.clamp_alpha * gated) * (upped + 1)
    if activation in GATES:
        return FUNCTIONS[GATES[activation]](gated) * upped
    return FUNCTIONS[activation](upped)


def _project(leaves, x):
    return x @ leaves["kernel"] + leaves.get("bias", 0)


def _feed_forward(config, leaves, x, activation):
    gated = _inner_norm(config, leaves, "gate_norm", _project(leaves["gate"], x)) if "gate" in leaves else None
    upped = _inner_norm(config, leaves, "up_norm", _project(leaves["up"], x))
    if "up_scale" in leaves:
        upped = upped * math.sqrt(x.shape[-1]) * leaves["up_scale"]["scale"]
        gated = None if gated is None else gated * math.sqrt(x.shape[-1]) * leaves["gate_scale"]["scale"]
    hidden = _inner_norm(config, leaves, "hidden_norm", _hidden(config, activation, gated, upped))
    return _project(leaves["down"], hidden)


def _inner_norm(config, leaves, name, x):
    """The norm of this name where it has parameters, as all do that tests give."""
    return _norm(config, leaves[name], x, config.attention_norm_kind) if name in leaves else x


def _experts(config, leaves, x):
    """One token after the other."""
    y = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        row = x[place]
        logits = _project(leaves["router"], row)
        p = _softmax(logits)
        chosen = np.argsort(-(p + leaves.get("balance_bias", 0)))[: config.experts_per_token]
        weights = _softmax(logits[chosen]) if config.normalize_expert_weights else p[chosen]
        for expert, weight in zip(chosen, weights, strict=True):
            of_expert = {
                name.removeprefix("expert_"): {leaf: array[expert] for leaf, array in branch.items()}
                for name, branch in leaves.items()
                if name.startswith("expert_")
            }
            y[place] += weight * _feed_forward(config, of_expert, row, config.activation)
    if "shared" in leaves:
        shared = _feed_forward(config, leaves["shared"], x, config.activation)
        if "shared_gate" in leaves:
            shared = shared * sigmoid(_project(leaves["shared_gate"], x))
        y = y + shared
    return y
