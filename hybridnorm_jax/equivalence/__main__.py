"""Convert a Pre-LN checkpoint and prove the result: python -m hybridnorm_jax.equivalence CHECKPOINT_DIR OUT_DIR.

CHECKPOINT_DIR is a Hugging Face directory (config.json and safetensors) or a run's directory. OUT_DIR becomes a run's
directory, for eval.py and for init_from of train.py. Nothing is written unless both models agree in float64.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from hybridnorm_jax.command_line import exit_status
from hybridnorm_jax.config import ModelConfig, UserError

SEQUENCES, LONGEST = 2, 128


class NotEqualError(UserError):
    """The converted model is not the original."""


def main(words: list[str]) -> int:
    """The command; returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridnorm_jax.equivalence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument("out", metavar="OUT_DIR")
    parser.add_argument("--form", required=True, choices=("pre_rmsnorm", "pre_crmsnorm"))
    parser.add_argument("--pad-to", type=int, default=1, help="pre_crmsnorm: stored width is a multiple of it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="of OUT_DIR's parameters")
    parser.add_argument("--text", metavar="FILE", help="text to compare on; default: a source file of Python's own")
    options = parser.parse_args(words)
    return exit_status(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Read, convert in float64, prove, write."""
    import jax  # after parsing: JAX takes seconds to import

    jax.config.update("jax_enable_x64", True)
    from hybridnorm_jax.equivalence.decoder_forms import conversion_of
    from hybridnorm_jax.equivalence.directories import check_free, read_directory, write_run
    from hybridnorm_jax.equivalence.proof import LARGEST_RELATIVE, cast, prove, table

    if options.pad_to != 1 and options.form != "pre_crmsnorm":
        raise UserError(f"--pad-to {options.pad_to}: only for --form pre_crmsnorm")
    check_free(options.out)
    source = read_directory(options.checkpoint)
    model = source.config.model
    conversion = conversion_of(model, options.form, pad_to=options.pad_to)
    tokens, tokenizer = token_sets(options, source)
    print(f"{options.checkpoint}: {source.kind}, {describe(model)}")
    written = cast(conversion.convert(cast(source.params, "float64")), options.dtype)
    proof = prove(model, source.params, conversion, written, tokens)
    print(f"\n{table(proof)}\n")
    if not proof.holds:
        worst = max(row.relative for (arithmetic, _), row in proof.logits.items() if arithmetic == "float64")
        message = f"float64 logits differ by {worst:.1e} of the largest, more than {LARGEST_RELATIVE}; nothing written"
        raise NotEqualError(f"{options.checkpoint}: {message}")
    result = dataclasses.replace(conversion.config, param_dtype=options.dtype)
    write_run(options.out, source, result, written)
    print(f"{options.out}: {describe(result)}, {options.dtype}")
    if tokenizer == "bytes" and model.vocab_size != 257:
        print(f"no tokenizer.json in {options.checkpoint}: eval.py {options.out} needs data.source and data.files")


def token_sets(options: argparse.Namespace, source) -> tuple[dict, str]:
    """({"random": ..., "text": ...}, name of the tokenizer), each SEQUENCES sequences of at most LONGEST tokens."""
    import numpy as np

    from hybridnorm_jax.data import load_tokenizer

    model, tokenizer = source.config.model, load_tokenizer(source.config.data)
    length = min(LONGEST, model.max_positions or LONGEST)
    file = Path(options.text or argparse.__file__)
    try:
        ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 64 * SEQUENCES * length]).astype(np.int32)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {file}: cannot be read as UTF-8 text: {error}") from error
    if len(ids) < SEQUENCES * length:
        raise UserError(f"--text {file}: {len(ids)} tokens, {SEQUENCES * length} are needed")
    # A model without a tokenizer of its own gets bytes, which may be more than its vocabulary.
    text = ids[: SEQUENCES * length].reshape(SEQUENCES, length) % model.vocab_size
    random = np.random.default_rng(0).integers(0, model.vocab_size, text.shape, np.int32)
    return {"random tokens": random, f"text ({Path(tokenizer.name).name})": text}, tokenizer.name


def describe(model: ModelConfig) -> str:
    """The model in a few words."""
    width = f"width {model.d_model}"
    if model.norm_width is not None:
        width = f"stream of {model.norm_width} stored as {model.d_model}"
    return f"{model.scheme}, {model.num_layers} layers, {width}, {model.norm}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
