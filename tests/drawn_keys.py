"""Keys of a config.json that many architectures of transformers have, drawn at random.

Every key that changes numbers takes several values, and sizes are odd where they may be.
"""

from hybridnorm_jax.interop.architectures.usual_keys import GELUS

# Every name that is read, those with and those without a gate being the same.
ACTIVATIONS = list(GELUS)


def pick(rng, *values):
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def flag(rng):
    """True or false."""
    return bool(rng.integers(2))


def eps(rng):
    """What norms add, small or large enough to be seen."""
    return pick(rng, 1e-6, 1e-5, 1e-3, 0.03)


def heads_of(rng):
    """heads, kv_heads, an even head_dim."""
    kv_heads = pick(rng, 1, 2, 3)
    return kv_heads * pick(rng, 1, 2, 3), kv_heads, 2 * int(rng.integers(2, 7))


def common(rng):
    """The sizes as most of the newer architectures name them."""
    heads, kv_heads, head_dim = heads_of(rng)
    return {
        "vocab_size": int(rng.integers(20, 70)),
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": flag(rng),
        "max_position_embeddings": 40,
    }


def head_dim(rng, keys):
    """head_dim, often another than the width allows."""
    usual = keys["hidden_size"] // keys["num_attention_heads"]
    return {"head_dim": pick(rng, usual, 2 * int(rng.integers(2, 8)))}


def theta(rng):
    """The base of a rotation."""
    return pick(rng, 50.0, 1e4, 5e5)


def rope(rng, channels, *, fraction=None, types=("default", "linear", "llama3", "yarn", "longrope")):
    """rope_parameters of a head with so many channels that rotate."""
    kind = pick(rng, *types)
    values = {"rope_type": kind, "rope_theta": theta(rng)}
    if fraction is not None:
        values["partial_rotary_factor"] = fraction
    if kind in ("linear", "yarn"):
        values["factor"] = pick(rng, 1.5, 4.0)
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = pick(rng, 4, 8, 16)
    if kind == "llama3":
        values |= {"factor": 8.0, "low_freq_factor": pick(rng, 1.0, 1.5), "high_freq_factor": 4.0}
    if kind == "yarn":
        values |= pick(rng, {}, {"attention_factor": 1.3}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"truncate": False})
        values |= pick(rng, {}, {"mscale": 0.7, "mscale_all_dim": 1.2})
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            values[name] = [float(each) for each in 1 + 3 * rng.random(channels // 2).round(2)]
        values |= pick(rng, {}, {"factor": 3.0}, {"attention_factor": 1.2})
    return values


def whole_rope(rng, keys):
    """rope_parameters of heads that rotate as a whole."""
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    return {"rope_parameters": rope(rng, channels)}


def partial_rope(rng, keys, **more):
    """A fraction whose channels are even in number."""
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    rotating = 2 * int(rng.integers(1, channels // 2 + 1))
    fraction = rotating / channels
    if int(channels * fraction) != rotating:
        rotating, fraction = channels, 1.0
    return {"rope_parameters": rope(rng, rotating, fraction=fraction, **more)}


def layer_types(rng, count):
    """Which of so many layers have a window."""
    return [pick(rng, "sliding_attention", "full_attention") for _ in range(count)]


def gated(rng):
    """The activation of gated layers."""
    return {"hidden_act": pick(rng, "silu", *ACTIVATIONS)}


def rms_eps(rng):
    """rms_norm_eps."""
    return {"rms_norm_eps": eps(rng)}


def gpt2_sizes(rng):
    """The sizes as GPT-2 and its descendants name them, and what goes with them."""
    heads = pick(rng, 1, 2, 3, 4, 6)
    return {
        "vocab_size": int(rng.integers(20, 70)),
        "n_embd": heads * 2 * int(rng.integers(2, 6)),
        "n_layer": int(rng.integers(1, 5)),
        "n_head": heads,
        "n_inner": pick(rng, None, 17, 40),
        "n_positions": 40,
        "activation_function": pick(rng, *ACTIVATIONS),
        "layer_norm_epsilon": eps(rng),
        "tie_word_embeddings": flag(rng),
    }


def qwen_windows(rng, keys):
    """Windows in all layers from one on, or in those that a list names."""
    windows = {"use_sliding_window": flag(rng), "sliding_window": pick(rng, 2, 5)}
    layers = keys["num_hidden_layers"]
    if windows["use_sliding_window"] and flag(rng):
        return windows | {"layer_types": layer_types(rng, layers)}
    return windows | {"max_window_layers": int(rng.integers(0, layers + 1))}


def layered_rope(rng, keys):
    """rope_parameters of layers with a window, and of those without."""
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    full = rope(rng, channels)
    # transformers looks for it beside the two mappings, and a model that says it here is refused.
    full.pop("truncate", None)
    local = pick(rng, {"rope_type": "default", "rope_theta": theta(rng)}, dict(full))
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def experts(rng):
    """How many experts there are, and how many of them a token passes."""
    count = int(rng.integers(2, 7))
    return {"num_experts": count, "num_experts_per_tok": int(rng.integers(1, count + 1))}
