"""A run's tokenizer as the files that transformers reads: tokenizer.json and tokenizer_config.json."""

import json
from typing import Any

from etils import epath

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer, Tokenizer, read_tokenizer_file
from hybridnorm_jax.whole_files import expanded

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def tokenizer_files(data: DataSection, tokenizer: Tokenizer, *, longest: int | None) -> dict[str, bytes]:
    """The two files by name: that of bytes is written, another one copied, but for what training leaves out of it.

    Args:
      longest: text that the model can read, in tokens; None: of any length.
    """
    if isinstance(tokenizer, ByteTokenizer):
        content = json.dumps(byte_tokenizer_json(), ensure_ascii=False, indent=1).encode()
    else:
        file = read_tokenizer_file(epath.Path(expanded(data.tokenizer)), f"data.tokenizer={data.tokenizer}")
        content = _as_in_training(file)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # Of prompts of several lengths the last tokens are the ones to go on from.
        "padding_side": "left",
    }
    if tokenizer.separator is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.separator)
    if longest is not None:
        settings["model_max_length"] = longest
    return {TOKENIZER: content, TOKENIZER_CONFIG: json.dumps(settings, indent=2).encode() + b"\n"}


def _as_in_training(content: bytes) -> bytes:
    """A tokenizer.json whose ids of a text are those that HuggingFaceTokenizer gives: nothing is added or left out.

    transformers would add a beginning and an end to every text where the file says so, and merge by chance with a
    dropout. A file without such settings stays as it is.
    """
    settings = json.loads(content.decode("utf-8-sig"))
    plain = settings | dict.fromkeys(("truncation", "padding"))
    if (settings.get("post_processor") or {}).get("type") != "ByteLevel":  # which moves offsets, no ids
        plain["post_processor"] = None
    if settings["model"].get("dropout"):
        plain["model"] = settings["model"] | {"dropout": None}
    is_as_it_was = all(settings.get(key) == value for key, value in plain.items())
    return content if is_as_it_was else json.dumps(plain, ensure_ascii=False).encode()


def byte_tokenizer_json() -> dict[str, Any]:
    """ByteTokenizer as a tokenizer.json: a BPE of all bytes without any merge."""
    separator = {"id": ByteTokenizer.separator_id, "content": ByteTokenizer.separator, "special": True}
    separator |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [separator],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def byte_characters() -> list[str]:
    """The character by which the library's ByteLevel spells each byte.

    A byte that is a printable character of Latin-1 is that character; the others are those from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
