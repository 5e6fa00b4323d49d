"""`hybridnorm export`: write a run's model for PyTorch and transformers, or as plain safetensors."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.commands.program import ArgumentParser, check_outside, in_float64
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import import_plugins
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import named_plugins, to_yaml
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.streams import sturdy_streams

FORMATS = ("hf", "safetensors")
# The whole configuration of the run, beside the weights.
TRAINING_CONFIG = "training_config.yaml"
USAGE = "hybridnorm export RUN OUT_DIR [OPTION ...] [run.plugins=[...]]"
DESCRIPTION = """Writes the model of a run for PyTorch. transformers loads OUT_DIR: as one of
its own architectures where one expresses the model exactly, and with PyTorch
code that is written beside the weights everywhere else. The directory holds
the tokenizer, generation_config.json and a model card, too; that of an encoder
the model card alone.

run.plugins=[...] names the plugins of the run, which are imported only if you
name them."""


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm export RUN OUT_DIR [OPTION ...] [run.plugins=[...]]`."""
    check_syntax("export", arguments)
    options = _parser().parse_args([each for each in arguments if not each.startswith(f"{PLUGINS}=")])
    options.plugins = named_plugins(arguments)
    with sturdy_streams():  # nobody need read what is said for OUT_DIR to be written
        export(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm export", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "run", metavar="RUN", help="a run directory, RUN@STEP, or one checkpoint such as RUN/checkpoints/000500"
    )
    parser.add_argument("out", metavar="OUT_DIR", help="new directory")
    parser.add_argument(
        "--format",
        default="hf",
        choices=FORMATS,
        help="hf: for transformers (default); safetensors: our parameters by the names of our tree",
    )
    parser.add_argument("--dtype", choices=PARAM_DTYPES, help="dtype of the weights (default: as the run has them)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="the tokenizer.json of the run, where it is not at its old place any more"
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        default="other",
        help="license of the weights for the model card, such as apache-2.0 (default: other)",
    )
    return parser


def export(options: argparse.Namespace) -> None:
    """Read, and write."""
    from hybridnorm_jax.interop.huggingface import check_free

    _check_license(options.license)
    check_free(Path(options.out).absolute())
    check_outside(options.run, options.out)
    import_plugins(options.plugins)
    with in_float64():  # parameters in float64 stay so
        source = _read(options)
        written = _write(options, source)
    print(f"{options.out}: {written}, step {source.step} of {options.run}")
    if options.format == "hf":
        _say_how_to_load(options.out, source.config.model, written)


def _say_how_to_load(out: str, model: ModelConfig, kind: str) -> None:
    from hybridnorm_jax.commands.encoder_card import auto_class
    from hybridnorm_jax.interop.architectures import ALL

    trust = ", trust_remote_code=True" if ALL[kind].code_files else ""
    auto = auto_class(model) if isinstance(model, EncoderConfig) else "AutoModelForCausalLM"
    print("\nLoad it in Python, where torch and transformers are installed:")
    print(f"  {auto}.from_pretrained({out!r}{trust})")


def _check_license(name: str) -> None:
    if not name or not all(character.isalnum() or character in "-._" for character in name):
        raise UserError(f"--license {name!r:.60}: must be an identifier such as apache-2.0, mit or other")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
      config: of its run; data.tokenizer names the file that is there now.
      params: NumPy arrays.
      step: of the checkpoint.
      directory: of its run, or what the checkpoint lies in.
      tokenizer: of the run, None where it is not known.
      trained_on: what its parameters were trained on, as far as it says so.
    """

    config: RunConfig
    params: Any
    step: int
    directory: Path
    tokenizer: Any
    trained_on: Sequence[Any]


def _read(options: argparse.Namespace) -> Source:
    import jax
    import numpy as np

    from hybridnorm_jax.commands.own_tokenizer import own_tokenizer
    from hybridnorm_jax.training.checkpoints import Checkpoints
    from hybridnorm_jax.training.run_directory import load_run, newest_checkpoint, saved_config
    from hybridnorm_jax.training.trained_before import trained_on

    checkpoint, step = newest_checkpoint(options.run)
    directory = Path(checkpoint).parent
    with Checkpoints(directory, keep=1) as checkpoints:
        config = saved_config(checkpoints, step)
        data_state = checkpoints.read_data_state(step)
    known, data, is_named = trained_on(data_state, config.data), config.data, options.tokenizer is not None
    if is_named:
        data = dataclasses.replace(data, tokenizer=options.tokenizer)
    if isinstance(config.model, EncoderConfig):
        if is_named:
            raise UserError(
                f"--tokenizer {options.tokenizer}: {options.run} is an encoder, which no run trains on text"
            )
        tokenizer = None
    else:
        size = config.model.vocab_size
        tokenizer = own_tokenizer(data, known, vocab_size=size, where=options.run, is_named=is_named)
    # Whoever exports does not compute: the accelerators stay free, and no array is copied.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    config, params = load_run(checkpoint, shardings=place)
    config = dataclasses.replace(config, data=data)
    return Source(config, jax.tree.map(np.asarray, params), step, directory.parent, tokenizer, known)


def _write(options: argparse.Namespace, source: Source) -> str:
    """Write OUT_DIR; returns what it is."""
    from hybridnorm_jax.interop.architectures import config_to_json
    from hybridnorm_jax.interop.huggingface import save_huggingface
    from hybridnorm_jax.interop.parameter_files import save_parameters

    model = source.config.model
    dtype = options.dtype or model.param_dtype
    kind = config_to_json(model)[0] if options.format == "hf" else "safetensors"
    if isinstance(model, EncoderConfig):
        beside = _beside_an_encoder(model, source, kind=kind, dtype=dtype, license_name=options.license)
    else:
        beside = _beside_a_decoder(source, kind=kind, dtype=dtype, license_name=options.license)
    if kind == "safetensors":
        save_parameters(options.out, model, source.params, dtype=dtype, files=beside.files)
    else:
        save_huggingface(options.out, model, source.params, dtype=dtype, extra=beside.extra, files=beside.files)
    return kind


class _Beside(NamedTuple):
    """What is written beside the weights: files by name, and further keys of config.json."""

    files: dict[str, bytes]
    extra: dict[str, Any]


def _beside_an_encoder(model: EncoderConfig, source: Source, *, kind: str, dtype: str, license_name: str) -> _Beside:
    """The model card alone: no run trains an encoder, so nothing of data and of text belongs to it."""
    from hybridnorm_jax.commands.encoder_card import encoder_card

    card = encoder_card(model, name=source.config.run.name, kind=kind, dtype=dtype, license_name=license_name)
    return _Beside(files={"README.md": card.encode()}, extra={})


def _beside_a_decoder(source: Source, *, kind: str, dtype: str, license_name: str) -> _Beside:
    from hybridnorm_jax.commands.model_card import model_card
    from hybridnorm_jax.data.tokenizer_files import tokenizer_files

    model = source.config.model
    card = model_card(source, kind=kind, dtype=dtype, license_name=license_name)
    files = {"README.md": card.encode(), TRAINING_CONFIG: to_yaml(source.config).encode()}
    separator = source.config.data.separator_id
    if source.tokenizer is not None:
        separator = source.tokenizer.separator_id
        files |= tokenizer_files(source.config.data, source.tokenizer, longest=model.max_positions)
    if kind == "safetensors":
        return _Beside(files, extra={})
    # The separator begins a document and ends it.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator)
    files["generation_config.json"] = json.dumps(tokens, indent=2).encode() + b"\n"
    extra: dict[str, Any] = {"bos_token_id": separator, "eos_token_id": separator}
    if model.positions == "rope":
        extra["max_position_embeddings"] = source.config.train.seq_len
    return _Beside(files, extra)
