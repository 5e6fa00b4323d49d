"""Convert a Pre-LN checkpoint and prove the result: python -m hybridnorm_jax.equivalence CHECKPOINT_DIR OUT_DIR.

CHECKPOINT_DIR is a Hugging Face directory (config.json and safetensors) or a run's directory. OUT_DIR becomes a run's
directory, for eval.py and for init_from of train.py. Nothing is written unless both models agree in float64.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from hybridnorm_jax.command_line import exit_status
from hybridnorm_jax.config import ConfigError, ModelConfig, UserError

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
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", help="what is converted; stays as it is")
    parser.add_argument("out", metavar="OUT_DIR", help="made new; may exist if it is empty")
    parser.add_argument("--form", required=True, choices=("pre_rmsnorm", "pre_crmsnorm"), help="of the result")
    width = "pre_crmsnorm: zeros fill the stored stream up to a multiple of this (default 1: d - 1 channels)"
    parser.add_argument("--pad-to", type=int, default=1, help=width)
    dtype = "of OUT_DIR's parameters (default float32; a run in float64 needs JAX_ENABLE_X64=1)"
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help=dtype)
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: a source file of Python's own)")
    ignore = "key of config.json to read as if it were absent; may be repeated"
    parser.add_argument("--ignore-key", metavar="KEY", action="append", default=[], help=ignore)
    options = parser.parse_args(words)
    return exit_status(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Read, convert in float64, prove, write."""
    import jax  # after parsing: JAX takes seconds to import

    jax.config.update("jax_enable_x64", True)
    from hybridnorm_jax.equivalence.decoder_forms import conversion_of
    from hybridnorm_jax.equivalence.directories import check_free, read_directory, write_run
    from hybridnorm_jax.equivalence.proof import WRITTEN, cast, prove, table

    if options.pad_to < 1:
        raise UserError(f"--pad-to {options.pad_to}: must be at least 1")
    if options.pad_to != 1 and options.form != "pre_crmsnorm":
        raise UserError(f"--pad-to {options.pad_to}: only for --form pre_crmsnorm")
    check_free(options.out)
    source = read_directory(options.checkpoint, options.ignore_key)
    model = source.config.model
    try:
        conversion = conversion_of(model, options.form, pad_to=options.pad_to)
    except ConfigError as error:
        raise UserError(f"{options.checkpoint}: {error}") from error
    tokens = token_sets(options, source)
    print(f"{options.checkpoint}: {source.kind}, {describe(model)}")
    written = cast(conversion.convert(cast(source.params, "float64")), options.dtype)
    proof = prove(model, source.params, conversion, written, tokens)
    print(f"\n{table(proof)}\n")
    if not proof.holds:
        found = f"{proof.worst('float64'):.1e} in float64, {proof.worst(WRITTEN):.1e} {WRITTEN}"
        raise NotEqualError(f"{options.checkpoint}: logits differ by {found}, relative; nothing is written")
    result = dataclasses.replace(conversion.config, param_dtype=options.dtype)
    write_run(options.out, source, result, written)
    print(f"{options.out}: {describe(result)}, {options.dtype}")
    data = ""
    if source.tokenizer_file is None and source.kind == "Hugging Face":
        data = " data.source=tokens 'data.files=[F.npy]' data.validation_fraction=0 'data.validation.name=[F.npy]'"
        print("no tokenizer.json came with it: it reads token files F.npy only")
    print(f"\nNext: python eval.py {options.out}{data}")
    print(f"  or: python train.py {options.out}/config.yaml init_from={options.out} run.name=NAME{data}")


def token_sets(options: argparse.Namespace, source) -> dict:
    """{"random tokens": ..., "text (...)": ...}, each SEQUENCES sequences of at most LONGEST tokens."""
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
    name = Path(tokenizer.name).name
    name += f" mod {model.vocab_size}" if ids.max() >= model.vocab_size else ""
    text = ids[: SEQUENCES * length].reshape(SEQUENCES, length) % model.vocab_size
    random = np.random.default_rng(0).integers(0, model.vocab_size, text.shape, np.int32)
    return {"random tokens": random, f"text ({name})": text}


def describe(model: ModelConfig) -> str:
    """The model in a few words."""
    width = f"width {model.d_model}"
    if model.norm_width is not None:
        width = f"stream of {model.norm_width} stored as {model.d_model}"
    experts = f", {model.experts_per_token} of {model.num_experts} experts" if model.num_experts else ""
    return f"{model.scheme}, {model.num_layers} layers, {width}, {model.norm}{experts}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
