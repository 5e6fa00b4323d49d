"""The keys of every decoder of transformers that is read, drawn at random: DRAWS has a function for each."""

from drawn_keys import (
    ACTIVATIONS,
    common,
    eps,
    experts,
    flag,
    gated,
    gpt2_sizes,
    head_dim,
    layer_types,
    layered_rope,
    partial_rope,
    pick,
    qwen_windows,
    rms_eps,
    whole_rope,
)


def _gpt2(rng):
    return gpt2_sizes(rng) | {"scale_attn_weights": flag(rng)}


def _gpt_bigcode(rng):
    return gpt2_sizes(rng) | {"multi_query": flag(rng), "scale_attn_weights": flag(rng)}


def _gpt_neo(rng):
    keys = gpt2_sizes(rng)
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
    keys = gpt2_sizes(rng)
    return keys | {"rotary_dim": 2 * int(rng.integers(1, keys["n_embd"] // keys["n_head"] // 2 + 1))}


def _codegen(rng):
    keys = gpt2_sizes(rng)
    keys["n_embd"] += -keys["n_embd"] % (4 * keys["n_head"])
    return keys | {"rotary_dim": 2 * int(rng.integers(1, keys["n_embd"] // keys["n_head"] // 2 + 1))}


def _gpt_neox(rng):
    keys = common(rng)
    del keys["num_key_value_heads"]
    return {
        **keys,
        **partial_rope(rng, keys),
        "hidden_act": pick(rng, *ACTIVATIONS),
        "layer_norm_eps": eps(rng),
        "use_parallel_residual": flag(rng),
        "attention_bias": flag(rng),
    }


def _opt(rng):
    keys = common(rng)
    return {
        **{name: keys[name] for name in keys if name not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": keys["intermediate_size"],
        "word_embed_proj_dim": keys["hidden_size"],
        "activation_function": pick(rng, *ACTIVATIONS),
        "enable_bias": flag(rng),
        "layer_norm_elementwise_affine": flag(rng),
    }


def _xglm(rng):
    keys = common(rng)
    return {
        "vocab_size": keys["vocab_size"],
        "d_model": keys["hidden_size"],
        "ffn_dim": keys["intermediate_size"],
        "num_layers": keys["num_hidden_layers"],
        "attention_heads": keys["num_attention_heads"],
        "max_position_embeddings": 40,
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "activation_function": pick(rng, *ACTIVATIONS),
        "scale_embedding": flag(rng),
    }


def _biogpt(rng):
    keys = common(rng)
    del keys["num_key_value_heads"]
    return keys | {"hidden_act": pick(rng, *ACTIVATIONS), "scale_embedding": flag(rng), "layer_norm_eps": eps(rng)}


def _llama(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys)
    biases = {"attention_bias": flag(rng), "mlp_bias": flag(rng)}
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys) | biases


def _mistral(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys)
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 1, 3, 7, 64)}


def _qwen2(rng):
    keys = common(rng)
    keys |= pick(rng, {}, head_dim(rng, keys))
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys) | qwen_windows(rng, keys)


def _qwen3(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys)
    keys |= {"attention_bias": flag(rng)}
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys) | qwen_windows(rng, keys)


def _smollm3(rng):
    keys = common(rng)
    layers = keys["num_hidden_layers"]
    keys |= pick(rng, {"no_rope_layer_interval": pick(rng, 1, 2, 3)}, {"no_rope_layers": [pick(rng, 0, 1)] * layers})
    keys |= pick(rng, {}, {"use_sliding_window": True, "sliding_window": pick(rng, 2, 5)})
    keys |= {"attention_bias": flag(rng), "mlp_bias": flag(rng)}
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys)


def _granite(rng):
    keys = common(rng)
    keys |= {"attention_bias": flag(rng), "mlp_bias": flag(rng)}
    multipliers = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    keys |= {name: pick(rng, 1.0, 0.3, 3.7) for name in multipliers}
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys)


def _phi3(rng):
    keys = common(rng)
    keys |= partial_rope(rng, keys, types=("default", "longrope"))
    keys |= {"original_max_position_embeddings": keys["rope_parameters"].get("original_max_position_embeddings", 40)}
    return keys | gated(rng) | rms_eps(rng) | {"sliding_window": pick(rng, None, 3, 50), "pad_token_id": 0}


def _glm4(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys)
    keys |= {"attention_bias": flag(rng), "pad_token_id": 0, "eos_token_id": 1}
    return keys | gated(rng) | rms_eps(rng) | partial_rope(rng, keys)


def _olmo(rng):
    keys = common(rng)
    keys |= {"attention_bias": flag(rng), "clip_qkv": pick(rng, None, 0.5, 3.0)}
    return keys | gated(rng) | whole_rope(rng, keys)


def _olmo2(rng):
    keys = common(rng)
    return keys | gated(rng) | rms_eps(rng) | whole_rope(rng, keys) | {"attention_bias": flag(rng)}


def _olmo3(rng):
    keys = common(rng)
    keys |= pick(rng, {}, {"layer_types": layer_types(rng, keys["num_hidden_layers"])})
    keys |= {"sliding_window": pick(rng, 1, 3, 64), "attention_bias": flag(rng)}
    return keys | gated(rng) | rms_eps(rng) | layered_rope(rng, keys)


def _olmoe(rng):
    keys = common(rng) | experts(rng) | rms_eps(rng)
    return keys | whole_rope(rng, keys) | {"norm_topk_prob": flag(rng), "attention_bias": flag(rng)}


def _mixtral(rng):
    keys = common(rng) | rms_eps(rng)
    keys |= head_dim(rng, keys)
    drawn = experts(rng)
    keys |= {"num_local_experts": drawn["num_experts"], "num_experts_per_tok": drawn["num_experts_per_tok"]}
    return keys | whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 3)}


def _sparse(rng, keys):
    layers = keys["num_hidden_layers"]
    dense = pick(rng, {}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}) if layers > 1 else {}
    return {**experts(rng), **dense, "moe_intermediate_size": int(rng.integers(3, 20)), "norm_topk_prob": flag(rng)}


def _qwen2_moe(rng):
    keys = common(rng) | rms_eps(rng)
    keys |= _sparse(rng, keys) | {"shared_expert_intermediate_size": int(rng.integers(3, 20)), "qkv_bias": flag(rng)}
    return keys | whole_rope(rng, keys) | qwen_windows(rng, keys)


def _qwen3_moe(rng):
    keys = common(rng) | rms_eps(rng)
    keys |= pick(rng, {}, head_dim(rng, keys))
    keys |= _sparse(rng, keys) | {"attention_bias": flag(rng)}
    return keys | whole_rope(rng, keys) | {"use_sliding_window": flag(rng), "sliding_window": pick(rng, 2, 5)}


def _gpt_oss(rng):
    keys = common(rng) | rms_eps(rng)
    keys |= head_dim(rng, keys)
    drawn = experts(rng)
    keys |= {"num_local_experts": drawn["num_experts"], "num_experts_per_tok": drawn["num_experts_per_tok"]}
    keys |= {"attention_bias": flag(rng), "sliding_window": pick(rng, 1, 3, 64)}
    keys |= {"swiglu_alpha": pick(rng, 1.702, 0.9), "swiglu_limit": pick(rng, 7.0, 0.4)}
    keys |= pick(rng, {}, {"layer_types": layer_types(rng, keys["num_hidden_layers"])})
    return keys | pick(rng, {}, whole_rope(rng, keys))


def _phi(rng):
    keys = common(rng)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "layer_norm_eps": eps(rng), "qk_layernorm": flag(rng)}
    return keys | partial_rope(rng, keys)


def _stablelm(rng):
    keys = common(rng) | gated(rng)
    keys |= {name: flag(rng) for name in ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")}
    return keys | partial_rope(rng, keys) | {"layer_norm_eps": eps(rng)}


def _persimmon(rng):
    keys = common(rng)
    del keys["num_key_value_heads"]
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "layer_norm_eps": eps(rng), "qk_layernorm": flag(rng)}
    return keys | partial_rope(rng, keys)


def _nemotron(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "norm_eps": eps(rng)}
    return keys | partial_rope(rng, keys) | {"attention_bias": flag(rng), "mlp_bias": flag(rng)}


def _starcoder2(rng):
    keys = common(rng)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "norm_epsilon": eps(rng), "use_bias": flag(rng)}
    return keys | whole_rope(rng, keys) | {"sliding_window": pick(rng, None, 1, 3, 64)}


def _bloom(rng):
    keys = gpt2_sizes(rng)
    names = ("vocab_size", "n_layer", "n_head", "layer_norm_epsilon", "tie_word_embeddings")
    return {name: keys[name] for name in names} | {"hidden_size": keys["n_embd"]}


def _mpt(rng):
    keys = gpt2_sizes(rng)
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
    keys = common(rng)
    kv_heads = keys.pop("num_key_value_heads")
    keys["ffn_hidden_size"] = pick(rng, None, keys.pop("intermediate_size"))
    keys |= {"activation": pick(rng, *ACTIVATIONS), "layer_norm_epsilon": eps(rng), "bias": flag(rng)}
    keys |= pick(
        rng,
        {"new_decoder_architecture": True, "num_kv_heads": kv_heads, "num_ln_in_parallel_attn": pick(rng, None, 1, 2)},
        {"multi_query": True, "parallel_attn": flag(rng)},
        {"multi_query": False, "parallel_attn": flag(rng)},
    )
    # With rotation the class refuses a bias of bfloat16; without, the positions of all heads are rounded.
    return keys | pick(rng, {"alibi": True}, whole_rope(rng, keys))


def _cohere(rng):
    keys = common(rng) | gated(rng)
    keys |= {"attention_bias": flag(rng), "use_qk_norm": flag(rng), "layer_norm_eps": eps(rng)}
    return keys | whole_rope(rng, keys) | {"logit_scale": pick(rng, 1.0, 0.3)}


def _cohere2(rng):
    keys = common(rng) | gated(rng)
    keys |= {"attention_bias": flag(rng), "layer_norm_eps": eps(rng), "logit_scale": pick(rng, 1.0, 0.3)}
    layers = {"layer_types": layer_types(rng, keys["num_hidden_layers"])}
    keys |= pick(rng, layers, {"sliding_window_pattern": pick(rng, 2, 3)})
    return keys | whole_rope(rng, keys) | {"sliding_window": pick(rng, 1, 3, 64)}


def _gemma(rng):
    keys = common(rng)
    keys |= head_dim(rng, keys) | rms_eps(rng)
    keys |= {"hidden_act": pick(rng, *ACTIVATIONS), "attention_bias": flag(rng)}
    return keys | whole_rope(rng, keys)


def _gemma_layers(rng, keys):
    keys |= head_dim(rng, keys) | rms_eps(rng) | {"attention_bias": flag(rng)}
    keys |= {"hidden_activation": pick(rng, *ACTIVATIONS), "query_pre_attn_scalar": pick(rng, 5, 24)}
    keys |= {"final_logit_softcapping": pick(rng, None, 2.5), "attn_logit_softcapping": pick(rng, None, 1.5)}
    return {"sliding_window": pick(rng, 1, 3, 64)}


def _gemma2(rng):
    keys = common(rng)
    keys |= _gemma_layers(rng, keys)
    keys |= pick(rng, {}, {"layer_types": layer_types(rng, keys["num_hidden_layers"])})
    return keys | whole_rope(rng, keys)


def _gemma3(rng):
    keys = common(rng)
    keys |= _gemma_layers(rng, keys) | {"attn_logit_softcapping": None}
    layers = {"layer_types": layer_types(rng, keys["num_hidden_layers"])}
    keys |= pick(rng, layers, {"sliding_window_pattern": pick(rng, 2, 3)})
    return keys | layered_rope(rng, keys)


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
