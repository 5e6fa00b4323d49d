"""Keys that the config.json of any architecture may hold: those that change no number, and those of one value."""

from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.interop.hf_config_keys import Json, names

# Bookkeeping, token ids, generation, outputs, training.
COMMON_HARMLESS = names(
    """
    architectures transformers_version _name_or_path name_or_path _commit_hash _from_model_config
    _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled gradient_checkpointing
    use_cache output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss
    tie_last_hidden_states chunk_size_feed_forward is_decoder
    id2label label2id num_labels _num_labels problem_type finetuning_task tokenizer_class task_specific_params prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    initializer_range attention_dropout hidden_dropout classifier_dropout max_position_embeddings max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version
    """
)


# Tests of a value, as Architecture.fixed takes them.


def _null_or_false(value: Any, document: Json) -> bool:
    return value is None or value is False


def _none(value: Any, document: Json) -> bool:
    return value is None


def _null_or_empty(value: Any, document: Json) -> bool:
    return value is None or value == {}


def _dtype(value: Any, document: Json) -> bool:
    """The parameters are read as they are stored, so any dtype that they may have is as good as none."""
    return value is None or value in ("float64", "float32", "bfloat16", "float16")


def _full_attention(value: Any, document: Json) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) == {"full_attention"})


COMMON_FIXED: Mapping[str, Any] = {
    "is_causal": True,
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "layer_types": _full_attention,
    "pruned_heads": _null_or_empty,
    "per_layer_config": _null_or_empty,
    **dict.fromkeys(
        names(
            "is_encoder_decoder add_cross_attention tie_encoder_decoder use_sliding_window use_bidirectional_attention "
            "rope_interleaved use_qk_norm"
        ),
        _null_or_false,
    ),
    **dict.fromkeys(
        names(
            "sliding_window attention_chunk_size cross_attention_hidden_size clip_qkv attn_logit_softcapping "
            "final_logit_softcapping logit_scale quantization_config compression_config auto_map no_rope_layers"
        ),
        _none,
    ),
}
