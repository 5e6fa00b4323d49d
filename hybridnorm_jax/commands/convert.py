"""`hybridnorm convert`: convert a Pre-LN checkpoint without loss, and prove the result."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import ArgumentParser, again, check_outside, in_float64
from hybridnorm_jax.commands.saved_model import SavedModel, read_directory
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.commands.which_parameters import add_option
from hybridnorm_jax.config.data_section import UNKNOWN_TOKENIZER
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import as_arguments, import_plugins
from hybridnorm_jax.config.yaml_files import named_plugins
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.streams import sturdy_streams
from hybridnorm_jax.whole_files import is_local

SEQUENCES, LONGEST = 2, 128
# Of any device's lanes; a wider stream would be mostly zeros.
LARGEST_PAD = 1024
# Of a file system's 255 bytes, less what a directory that is not yet whole has in its name besides.
LONGEST_NAME = 200
FORMS = ("pre_rmsnorm", "pre_crmsnorm")
DTYPES = ("float32", "float64")

USAGE = "hybridnorm convert CHECKPOINT_DIR OUT_DIR --form FORM [OPTION ...]\n       [run.plugins=[...]]"
DESCRIPTION = """Converts a Pre-LN model to a cheaper form, whose logits are the same up to
rounding.

Both models are compared in float64. Where they are not equal, nothing is
written.

run.plugins=[...] names the plugins of a run, which are imported only if you
name them."""


class NotEqualError(UserError):
    """The converted model is not the original."""


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm convert CHECKPOINT_DIR OUT_DIR --form FORM [OPTION ...] [run.plugins=[...]]`."""
    check_syntax("convert", arguments)
    options = _parser().parse_args([each for each in arguments if not each.startswith(f"{PLUGINS}=")])
    options.plugins = named_plugins(arguments)
    # Nobody need read what is said for OUT_DIR to be written.
    with sturdy_streams(), in_float64():
        convert(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm convert", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_DIR",
        help="what is converted: a Hugging Face directory (config.json, safetensors; needs the extra hf), "
        "a run directory, or one checkpoint of a run",
    )
    parser.add_argument(
        "out",
        metavar="OUT_DIR",
        help="new run directory, for `hybridnorm eval` and for init_from= of `hybridnorm train`",
    )
    parser.add_argument("--form", required=True, choices=FORMS, help="form of the result")
    parser.add_argument(
        "--pad-to",
        metavar="N",
        type=int,
        default=1,
        help="for pre_crmsnorm: zeros fill the stored stream up to a multiple of N (default 1: d - 1 channels)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="dtype of the parameters in OUT_DIR (default float32; a run in float64 needs JAX_ENABLE_X64=1)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text to compare the models on (default: a source file of Python)"
    )
    parser.add_argument(
        "--ignore-key",
        metavar="KEY",
        action="append",
        default=[],
        help="read config.json as if it did not hold KEY; may be repeated",
    )
    add_option(parser)
    return parser


def convert(options: argparse.Namespace) -> None:
    """Read, convert in float64, prove, write."""
    from hybridnorm_jax.commands.program_cache import keep_programs
    from hybridnorm_jax.equivalence.forms import conversion_of
    from hybridnorm_jax.equivalence.proof import WRITTEN, cast, prove, table
    from hybridnorm_jax.training.run_directory import check_free, save_run

    if options.pad_to < 1:
        raise UserError(f"--pad-to {options.pad_to}: must be at least 1")
    if options.pad_to != 1 and options.form != "pre_crmsnorm":
        raise UserError(f"--pad-to {options.pad_to}: only for --form pre_crmsnorm")
    _check_out(options.checkpoint, options.out)
    check_free(options.out)
    import_plugins(options.plugins)
    keep_programs()
    # As wide as it is computed with: files of several dtypes lose nothing.
    source = read_directory(options.checkpoint, options.ignore_key, dtype="float64", plain=options.plain)
    model = source.config.model
    if options.pad_to > max(LARGEST_PAD, model.d_model):
        right = f"must be at most {max(LARGEST_PAD, model.d_model)} for a model of width {model.d_model}"
        raise UserError(f"--pad-to {options.pad_to}: {right}")
    try:
        conversion = conversion_of(model, options.form, pad_to=options.pad_to)
    except ConfigError as error:
        raise UserError(f"{options.checkpoint}: {error}") from error
    inputs = encoder_sets(options, model) if isinstance(model, EncoderConfig) else token_sets(options, source)
    print(f"{options.checkpoint}: {source.kind}, {describe(model)}")
    written = cast(conversion.convert(cast(source.params, "float64")), options.dtype)
    proof = prove(model, source.params, conversion, written, inputs)
    print(f"\n{table(proof)}\n")
    for change in conversion.changes:
        print(f"changed: {change}")
    _say_what_remains(model, conversion.centrings)
    if not proof.holds:
        found = f"{proof.worst('float64'):.1e} in float64, {proof.worst(WRITTEN):.1e} {WRITTEN}"
        raise NotEqualError(f"{options.checkpoint}: {proof.compared} differ by {found}, relative; nothing is written")
    result = dataclasses.replace(conversion.config, param_dtype=options.dtype)
    # As they are named now: the run may have named them by other paths.
    needed = source.config.run.plugins and (options.plugins or source.config.run.plugins)
    run_section = dataclasses.replace(source.config.run, plugins=needed)
    # The model has the form itself now.
    train = dataclasses.replace(
        source.config.train, equivalent_form="none", equivalent_pad_to=1, check_invariants=False
    )
    config = dataclasses.replace(source.config, model=result, run=run_section, train=train)
    save_run(
        options.out,
        config,
        written,
        step=source.step,
        tokenizer_file=source.tokenizer_file,
        trained_on=source.trained_on,
    )
    print(f"{options.out}: {describe(result)}, {options.dtype}")
    if isinstance(model, EncoderConfig):
        print(f"\nNext: {again(['export', options.out, 'EXPORT_DIR'])}    for PyTorch")
        print(f"  or, in Python: config, params = hn.load_run({options.out!r}); hn.build_model(config.model)")
    else:
        _say_next(options.out, needed, has_tokenizer=source.config.data.tokenizer != UNKNOWN_TOKENIZER)


def _say_what_remains(model: ModelConfig, centrings: Sequence[str]) -> None:
    """Name and count the means that the new model still subtracts."""
    if centrings:
        print(f"means over the channels that are still subtracted: {len(centrings)}")
        for place in centrings:
            print(f"  {place}")
    if isinstance(model, EncoderConfig) and model.norm_pooled_only:
        print("the last hidden state is the stream, without its mean now; what is pooled is compared")
    if centrings:
        print()


def _check_out(checkpoint: str, out: str) -> None:
    """Raise UserError for a name that no file system takes, or one in what is converted."""
    if not is_local(out):
        return
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(out).parts):
        raise UserError(f"{out:.60}...: a name in it is longer than {LONGEST_NAME} bytes")
    check_outside(checkpoint, out)


def _say_next(out: str, plugins: Sequence[str], *, has_tokenizer: bool) -> None:
    data, needed = "", as_arguments(plugins)
    if not has_tokenizer:
        print("no tokenizer.json came with it: the model can read token files only, below F.npy to train on,")
        print("and V.npy to score")
        data = " data.source=tokens 'data.files=[F.npy]' data.validation_fraction=0 'data.validation.name=[V.npy]'"
    print(f"\nNext: {again(['eval', out, *needed])}{data}")
    print(f"  or: {again(['train', f'{out}/config.yaml', f'init_from={out}', 'run.name=NAME', *needed])}{data}")


def encoder_sets(options: argparse.Namespace, model: EncoderConfig) -> dict:
    """{"random pixels" or "random tokens": ...}: SEQUENCES images or sequences for an encoder."""
    import numpy as np

    if options.text is not None:
        raise UserError(f"--text {options.text}: {options.checkpoint} is an encoder, which is compared on random input")
    random = np.random.default_rng(0)
    if model.reads_pixels:
        return {"random pixels": random.normal(size=(SEQUENCES, *model.image_size, model.num_channels))}
    length = min(LONGEST, model.max_positions or LONGEST)
    return {"random tokens": random.integers(0, model.vocab_size, (SEQUENCES, length), np.int32)}


def token_sets(options: argparse.Namespace, source: SavedModel) -> dict:
    """{"random tokens": ..., "text (...)": ...}, each SEQUENCES sequences of at most LONGEST tokens."""
    import numpy as np

    from hybridnorm_jax.data import load_tokenizer

    model, data = source.config.model, source.config.data
    # Text is only one more kind of input here, so bytes do where no tokenizer is known.
    tokenizer = load_tokenizer(data if data.knows_tokenizer else dataclasses.replace(data, tokenizer="bytes"))
    length = min(LONGEST, model.max_positions or LONGEST)
    file = Path(argparse.__file__ if options.text is None else options.text)
    ids = tokenizer.encode(_beginning(file, 64 * SEQUENCES * length)).astype(np.int32)
    if len(ids) < SEQUENCES * length:
        raise UserError(f"--text {file}: {len(ids)} tokens, {SEQUENCES * length} are needed")
    # There may be more bytes than a vocabulary has tokens.
    name = Path(tokenizer.name).name
    name += f" mod {model.vocab_size}" if ids.max() >= model.vocab_size else ""
    text = ids[: SEQUENCES * length].reshape(SEQUENCES, length) % model.vocab_size
    random = np.random.default_rng(0).integers(0, model.vocab_size, text.shape, np.int32)
    return {"random tokens": random, f"text ({name})": text}


def _beginning(file: Path, characters: int) -> str:
    """So many characters of a text."""
    if file.exists() and not file.is_file():
        raise UserError(f"--text {file}: cannot be read as UTF-8 text: no regular file")
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {file}: cannot be read as UTF-8 text: {error}") from error


def describe(model: ModelConfig) -> str:
    """The model in a few words."""
    width = f"width {model.d_model}"
    if model.norm_width is not None:
        width = f"stream of {model.norm_width} stored as {model.d_model}"
    experts = f", {model.experts_per_token} of {model.num_experts} experts" if model.num_experts else ""
    return f"{model.scheme}, {model.num_layers} layers, {width}, {model.norm}{experts}"
