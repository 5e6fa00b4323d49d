"""Random tiny models of transformers' own classes: what our reader is compared with.

DRAWS has for each architecture a function that draws the keys of a config.json: every key that changes numbers takes
several values, sizes are odd where they may be. `write` makes the model, lets every parameter be random, writes it as
transformers does and returns its logits.
"""

import numpy as np

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "silu"]


def pick(rng, *values):
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def _flag(rng):
    return bool(rng.integers(2))


def _eps(rng):
    return pick(rng, 1e-6, 1e-5, 1e-3, 0.03)


def _heads(rng, *, most_dim=6):
    """heads, kv_heads, an even head_dim."""
    kv_heads = pick(rng, 1, 2, 3)
    return kv_heads * pick(rng, 1, 2, 3), kv_heads, 2 * int(rng.integers(2, most_dim + 1))


def _common(rng):
    """The sizes as most of the newer architectures name them."""
    heads, kv_heads, head_dim = _heads(rng)
    return {
        "vocab_size": int(rng.integers(20, 70)),
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": _flag(rng),
        "max_position_embeddings": 40,
    }


def _head_dim(rng, keys):
    """head_dim, often another than the width allows."""
    usual = keys["hidden_size"] // keys["num_attention_heads"]
    return {"head_dim": pick(rng, usual, 2 * int(rng.integers(2, 8)))}


def _theta(rng):
    return pick(rng, 50.0, 1e4, 5e5)


def rope(rng, channels, *, fraction=None, types=("default", "linear", "llama3", "yarn", "longrope")):
    """rope_parameters of a head with so many channels that rotate."""
    kind = pick(rng, *types)
    values = {"rope_type": kind, "rope_theta": _theta(rng)}
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


def _whole_rope(rng, keys):
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    return {"rope_parameters": rope(rng, channels)}


def _partial_rope(rng, keys, **more):
    """A fraction whose channels are even in number."""
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    rotating = 2 * int(rng.integers(1, channels // 2 + 1))
    fraction = rotating / channels
    if int(channels * fraction) != rotating:
        rotating, fraction = channels, 1.0
    return {"rope_parameters": rope(rng, rotating, fraction=fraction, **more)}


def _layer_types(rng, count):
    return [pick(rng, "sliding_attention", "full_attention") for _ in range(count)]


def _gpt2_like(rng):
    heads = pick(rng, 1, 2, 3, 4, 6)
    return {
        "vocab_size": int(rng.integers(20, 70)),
        "n_embd": heads * 2 * int(rng.integers(2, 6)),
        "n_layer": int(rng.integers(1, 5)),
        "n_head": heads,
        "n_inner": pick(rng, None, 17, 40),
        "n_positions": 40,
        "activation_function": pick(rng, *ACTIVATIONS),
        "layer_norm_epsilon": _eps(rng),
        "tie_word_embeddings": _flag(rng),
    }


def _gpt2(rng):
    return _gpt2_like(rng) | {"scale_attn_weights": _flag(rng)}


def _gpt_bigcode(rng):
    return _gpt2_like(rng) | {"multi_query": _flag(rng), "scale_attn_weights": _flag(rng)}


def _gpt_neo(rng):
    keys = _gpt2_like(rng)
    layers = keys["n_layer"]
    return {
        "vocab_size": keys["vocab_size"],
        "hidden_size": keys["n_embd"],
        "num_layers": layers,
        "num_heads": keys["n_head"],
        "intermediate_size": keys["n_inner"],
        "max_position_embeddings": 40,
        "attention_types": [[[pick(rng, "global", "local")], 1] for _ in range(layers)],
        "window_size": int(rng.integers(1, 9)),
        **{name: keys[name] for name in ("activation_function", "layer_norm_epsilon", "tie_word_embeddings")},
    }


def _gptj(rng):
    keys = _gpt2_like(rng)
    return keys | {"rotary_dim": 2 * int(rng.integers(1, keys["n_embd"] // keys["n_head"] // 2 + 1))}


def _codegen(rng):
    keys = _gpt2_like(rng)
    keys["n_embd"] += -keys["n_embd"] % (4 * keys["n_head"])
    return keys | {"rotary_dim": 2 * int(rng.integers(1, keys["n_embd"] // keys["n_head"] // 2 + 1))}


def _gpt_neox(rng):
    keys = _common(rng)
    del keys["num_key_value_heads"]
    return {
        **keys,
        **_partial_rope(rng, keys),
        "hidden_act": pick(rng, *ACTIVATIONS),
        "layer_norm_eps": _eps(rng),
        "use_parallel_residual": _flag(rng),
        "attention_bias": _flag(rng),
    }


def _opt(rng):
    keys = _common(rng)
    return {
        **{name: keys[name] for name in keys if name not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": keys["intermediate_size"],
        "word_embed_proj_dim": keys["hidden_size"],
        "activation_function": pick(rng, *ACTIVATIONS),
        "enable_bias": _flag(rng),
        "layer_norm_elementwise_affine": _flag(rng),
    }


def _xglm(rng):
    keys = _common(rng)
    return {
        "vocab_size": keys["vocab_size"],
        "d_model": keys["hidden_size"],
        "ffn_dim": keys["intermediate_size"],
        "num_layers": keys["num_hidden_layers"],
        "attention_heads": keys["num_attention_heads"],
        "max_position_embeddings": 40,
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "activation_function": pick(rng, *ACTIVATIONS),
        "scale_embedding": _flag(rng),
    }


def _biogpt(rng):
    keys = _common(rng)
    del keys["num_key_value_heads"]
    return keys | {"hidden_act": pick(rng, *ACTIVATIONS), "scale_embedding": _flag(rng), "layer_norm_eps": _eps(rng)}


def _gated(rng):
    return {"hidden_act": pick(rng, "silu", *ACTIVATIONS)}


def _rms(rng):
    return {"rms_norm_eps": _eps(rng)}


def _llama(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys)
    biases = {"attention_bias": _flag(rng), "mlp_bias": _flag(rng)}
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys) | biases


def _mistral(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys)
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 1, 3, 7, 64)}


def _qwen_windows(rng, keys):
    windows = {"use_sliding_window": _flag(rng), "sliding_window": pick(rng, 2, 5)}
    layers = keys["num_hidden_layers"]
    if windows["use_sliding_window"] and _flag(rng):
        return windows | {"layer_types": _layer_types(rng, layers)}
    return windows | {"max_window_layers": int(rng.integers(0, layers + 1))}


def _qwen2(rng):
    keys = _common(rng)
    keys |= pick(rng, {}, _head_dim(rng, keys))
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys) | _qwen_windows(rng, keys)


def _qwen3(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys)
    keys |= {"attention_bias": _flag(rng)}
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys) | _qwen_windows(rng, keys)


def _smollm3(rng):
    keys = _common(rng)
    layers = keys["num_hidden_layers"]
    keys |= pick(rng, {"no_rope_layer_interval": pick(rng, 1, 2, 3)}, {"no_rope_layers": [pick(rng, 0, 1)] * layers})
    keys |= pick(rng, {}, {"use_sliding_window": True, "sliding_window": pick(rng, 2, 5)})
    keys |= {"attention_bias": _flag(rng), "mlp_bias": _flag(rng)}
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys)


def _granite(rng):
    keys = _common(rng)
    keys |= {"attention_bias": _flag(rng), "mlp_bias": _flag(rng)}
    multipliers = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    keys |= {name: pick(rng, 1.0, 0.3, 1.7) for name in multipliers}
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys)


def _phi3(rng):
    keys = _common(rng)
    keys |= _partial_rope(rng, keys, types=("default", "longrope"))
    keys |= {"original_max_position_embeddings": keys["rope_parameters"].get("original_max_position_embeddings", 40)}
    return keys | _gated(rng) | _rms(rng) | {"sliding_window": pick(rng, None, 3, 50), "pad_token_id": 0}


def _glm4(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys)
    keys |= {"attention_bias": _flag(rng), "pad_token_id": 0, "eos_token_id": 1}
    return keys | _gated(rng) | _rms(rng) | _partial_rope(rng, keys)


def _olmo(rng):
    keys = _common(rng)
    keys |= {"attention_bias": _flag(rng), "clip_qkv": pick(rng, None, 0.5, 3.0)}
    return keys | _gated(rng) | _whole_rope(rng, keys)


def _olmo2(rng):
    keys = _common(rng)
    return keys | _gated(rng) | _rms(rng) | _whole_rope(rng, keys) | {"attention_bias": _flag(rng)}


def _layered_rope(rng, keys):
    channels = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
    full = rope(rng, channels, types=("default", "linear", "llama3", "longrope"))
    local = pick(rng, {"rope_type": "default", "rope_theta": _theta(rng)}, dict(full))
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _olmo3(rng):
    keys = _common(rng)
    keys |= pick(rng, {}, {"layer_types": _layer_types(rng, keys["num_hidden_layers"])})
    keys |= {"sliding_window": pick(rng, 1, 3, 64), "attention_bias": _flag(rng)}
    return keys | _gated(rng) | _rms(rng) | _layered_rope(rng, keys)


def _experts(rng):
    count = int(rng.integers(2, 7))
    return {"num_experts": count, "num_experts_per_tok": int(rng.integers(1, count + 1))}


def _olmoe(rng):
    keys = _common(rng) | _experts(rng) | _rms(rng)
    return keys | _whole_rope(rng, keys) | {"norm_topk_prob": _flag(rng), "attention_bias": _flag(rng)}


def _mixtral(rng):
    keys = _common(rng) | _rms(rng)
    keys |= _head_dim(rng, keys)
    experts = _experts(rng)
    keys |= {"num_local_experts": experts["num_experts"], "num_experts_per_tok": experts["num_experts_per_tok"]}
    return keys | _whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 3)}


def _sparse(rng, keys):
    layers = keys["num_hidden_layers"]
    dense = pick(rng, {}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}) if layers > 1 else {}
    return {**_experts(rng), **dense, "moe_intermediate_size": int(rng.integers(3, 20)), "norm_topk_prob": _flag(rng)}


def _qwen2_moe(rng):
    keys = _common(rng) | _rms(rng)
    keys |= _sparse(rng, keys) | {"shared_expert_intermediate_size": int(rng.integers(3, 20)), "qkv_bias": _flag(rng)}
    return keys | _whole_rope(rng, keys) | _qwen_windows(rng, keys)


def _qwen3_moe(rng):
    keys = _common(rng) | _rms(rng)
    keys |= pick(rng, {}, _head_dim(rng, keys))
    keys |= _sparse(rng, keys) | {"attention_bias": _flag(rng)}
    return keys | _whole_rope(rng, keys) | {"use_sliding_window": _flag(rng), "sliding_window": pick(rng, 2, 5)}


def _gpt_oss(rng):
    keys = _common(rng) | _rms(rng)
    keys |= _head_dim(rng, keys)
    experts = _experts(rng)
    keys |= {"num_local_experts": experts["num_experts"], "num_experts_per_tok": experts["num_experts_per_tok"]}
    keys |= {"attention_bias": _flag(rng), "sliding_window": pick(rng, 1, 3, 64)}
    keys |= {"swiglu_alpha": pick(rng, 1.702, 0.9), "swiglu_limit": pick(rng, 7.0, 0.4)}
    keys |= pick(rng, {}, {"layer_types": _layer_types(rng, keys["num_hidden_layers"])})
    return keys | pick(rng, {}, _whole_rope(rng, keys))


def _phi(rng):
    keys = _common(rng)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "layer_norm_eps": _eps(rng), "qk_layernorm": _flag(rng)}
    return keys | _partial_rope(rng, keys)


def _stablelm(rng):
    keys = _common(rng) | _gated(rng)
    keys |= {name: _flag(rng) for name in ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")}
    return keys | _partial_rope(rng, keys) | {"layer_norm_eps": _eps(rng)}


def _persimmon(rng):
    keys = _common(rng)
    del keys["num_key_value_heads"]
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "layer_norm_eps": _eps(rng), "qk_layernorm": _flag(rng)}
    return keys | _partial_rope(rng, keys)


def _nemotron(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "norm_eps": _eps(rng)}
    return keys | _partial_rope(rng, keys) | {"attention_bias": _flag(rng), "mlp_bias": _flag(rng)}


def _starcoder2(rng):
    keys = _common(rng)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "norm_epsilon": _eps(rng), "use_bias": _flag(rng)}
    return keys | _whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 1, 3, 64)}


def _bloom(rng):
    keys = _gpt2_like(rng)
    names = ("vocab_size", "n_layer", "n_head", "layer_norm_epsilon", "tie_word_embeddings")
    return {name: keys[name] for name in names} | {"hidden_size": keys["n_embd"]}


def _mpt(rng):
    keys = _gpt2_like(rng)
    attention = {"clip_qkv": pick(rng, None, 0.5, 2.0), "softmax_scale": pick(rng, None, 0.3)}
    return {
        "vocab_size": keys["vocab_size"],
        "d_model": keys["n_embd"],
        "n_layers": keys["n_layer"],
        "n_heads": keys["n_head"],
        "max_seq_len": 40,
        "layer_norm_epsilon": keys["layer_norm_epsilon"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "attn_config": attention,
    }


def _falcon(rng):
    keys = _common(rng)
    kv_heads = keys.pop("num_key_value_heads")
    keys["ffn_hidden_size"] = pick(rng, None, keys.pop("intermediate_size"))
    keys |= {"activation": pick(rng, *ACTIVATIONS), "layer_norm_epsilon": _eps(rng), "bias": _flag(rng)}
    keys |= pick(
        rng,
        {"new_decoder_architecture": True, "num_kv_heads": kv_heads, "num_ln_in_parallel_attn": pick(rng, None, 1, 2)},
        {"multi_query": True, "parallel_attn": _flag(rng)},
        {"multi_query": False, "parallel_attn": _flag(rng)},
    )
    # With rotation the class refuses a bias of bfloat16; without, the positions of all heads are rounded.
    return keys | pick(rng, {"alibi": True}, _whole_rope(rng, keys))


def _cohere(rng):
    keys = _common(rng) | _gated(rng)
    keys |= {"attention_bias": _flag(rng), "use_qk_norm": _flag(rng), "layer_norm_eps": _eps(rng)}
    return keys | _whole_rope(rng, keys) | {"logit_scale": pick(rng, 1.0, 0.3)}


def _cohere2(rng):
    keys = _common(rng) | _gated(rng)
    keys |= {"attention_bias": _flag(rng), "layer_norm_eps": _eps(rng), "logit_scale": pick(rng, 1.0, 0.3)}
    layers = {"layer_types": _layer_types(rng, keys["num_hidden_layers"])}
    keys |= pick(rng, layers, {"sliding_window_pattern": pick(rng, 2, 3)})
    return keys | _whole_rope(rng, keys) | {"sliding_window": pick(rng, 1, 3, 64)}


def _gemma(rng):
    keys = _common(rng)
    keys |= _head_dim(rng, keys) | _rms(rng)
    keys |= {"hidden_act": pick(rng, "gelu_pytorch_tanh", "silu", "relu"), "attention_bias": _flag(rng)}
    return keys | _whole_rope(rng, keys)


def _gemma_layers(rng, keys):
    keys |= _head_dim(rng, keys) | _rms(rng) | {"attention_bias": _flag(rng)}
    keys |= {"hidden_activation": pick(rng, "gelu_pytorch_tanh", "silu"), "query_pre_attn_scalar": pick(rng, 5, 24)}
    keys |= {"final_logit_softcapping": pick(rng, None, 30.0), "attn_logit_softcapping": pick(rng, None, 1.5)}
    return {"sliding_window": pick(rng, 1, 3, 64)}


def _gemma2(rng):
    keys = _common(rng)
    keys |= _gemma_layers(rng, keys)
    keys |= pick(rng, {}, {"layer_types": _layer_types(rng, keys["num_hidden_layers"])})
    return keys | _whole_rope(rng, keys)


def _gemma3(rng):
    keys = _common(rng)
    keys |= _gemma_layers(rng, keys) | {"attn_logit_softcapping": None}
    layers = {"layer_types": _layer_types(rng, keys["num_hidden_layers"])}
    keys |= pick(rng, layers, {"sliding_window_pattern": pick(rng, 2, 3)})
    return keys | _layered_rope(rng, keys)


DRAWS = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "codegen": _codegen,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "xglm": _xglm,
    "biogpt": _biogpt,
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "glm4": _glm4,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "olmo": _olmo,
    "olmo3": _olmo3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "gpt_oss": _gpt_oss,
    "phi": _phi,
    "stablelm": _stablelm,
    "persimmon": _persimmon,
    "nemotron": _nemotron,
    "starcoder2": _starcoder2,
    "bloom": _bloom,
    "mpt": _mpt,
    "falcon": _falcon,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
# Token ids beyond a small vocabulary.
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def build(name, keys, seed=0):
    """The model of these keys, with random parameters, in float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, **(TOKENS | keys))
    model = (
        transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
        .eval()
        .float()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Small enough that roundings do not grow from layer to layer.
            scale = min(0.3, parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1:  # norm scales, for most: not near 0, where everything would vanish
                parameter.add_(0.7)
    return model


def logits_of(model, tokens):
    """Its logits."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def tokens_of(keys, seed=0, shape=(2, 11)):
    """Tokens for a model of these keys."""
    return np.random.default_rng(seed).integers(0, keys["vocab_size"], shape).astype(np.int32)
