"""`hybridnorm export`: write a run's model for PyTorch and transformers, or as plain safetensors."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnorm_jax.commands.program import ArgumentParser, check_outside, in_float64
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.commands.which_parameters import WhichParameters, add_option
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import import_plugins
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import named_plugins, to_yaml
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import PARAM_DTYPES, ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.streams import sturdy_streams

if TYPE_CHECKING:
    from hybridnorm_jax.commands.model_card import Card

FORMATS = ("hf", "safetensors")
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
    add_option(parser)
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
    check_outside(options.run, options.out)
    check_free(Path(options.out).absolute())
    import_plugins(options.plugins)
    with in_float64():  # parameters in float64 stay so
        source = _read(options)
        written = _write(options, source)
    print(f"{options.out}: {written}, step {source.step} of {options.run}{source.which.said}")
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
      which: whether they are averaged.
      tokenizer: of the run, None where it is not known.
      trained_on: what its parameters were trained on, as far as it says so.
      records: what the run recorded up to this step.
      is_trained_run: whether the run trained it: it was neither converted nor saved from Python as it is.
    """

    config: RunConfig
    params: Any
    step: int
    which: WhichParameters
    tokenizer: Any
    trained_on: Sequence[Any]
    records: Sequence[Mapping[str, Any]]
    is_trained_run: bool

    @property
    def knows_training(self) -> bool:
        """Whether anything is known of a training here: by this run, or by one that it was converted from."""
        return self.is_trained_run or bool(self.trained_on)


def _read(options: argparse.Namespace) -> Source:
    import jax
    import numpy as np

    from hybridnorm_jax.commands.own_tokenizer import own_tokenizer
    from hybridnorm_jax.training.metrics_file import read_records
    from hybridnorm_jax.training.run_directory import load_step, newest_step, saved_config
    from hybridnorm_jax.training.trained_before import trained_on, was_trained

    checkpoints, step = newest_step(options.run)
    config = saved_config(checkpoints, step)
    data_state = checkpoints.read_data_state(step)
    which = WhichParameters(checkpoints.has_average(step), options.plain)
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
    config, params = load_step(checkpoints, step, shardings=place, plain=options.plain)
    config = dataclasses.replace(config, data=data)
    records = [record for record in read_records(checkpoints.directory.parent) if record["step"] <= step]
    return Source(
        config=config,
        params=jax.tree.map(np.asarray, params),
        step=step,
        which=which,
        tokenizer=tokenizer,
        trained_on=known,
        records=records,
        is_trained_run=bool(records) or was_trained(data_state),
    )


def _write(options: argparse.Namespace, source: Source) -> str:
    """Write OUT_DIR; returns what it is."""
    from hybridnorm_jax.commands.model_card import Card
    from hybridnorm_jax.interop.architectures import config_to_json
    from hybridnorm_jax.interop.huggingface import save_huggingface
    from hybridnorm_jax.interop.parameter_files import save_parameters

    model = source.config.model
    dtype = options.dtype or model.param_dtype
    kind = config_to_json(model)[0] if options.format == "hf" else "safetensors"
    card = Card(name=source.config.run.name, kind=kind, dtype=dtype, license_name=options.license)
    beside = _beside_an_encoder(model, card) if isinstance(model, EncoderConfig) else _beside_a_decoder(source, card)
    if kind == "safetensors":
        save_parameters(options.out, model, source.params, dtype=dtype, files=beside.files)
    else:
        save_huggingface(options.out, model, source.params, dtype=dtype, extra=beside.extra, files=beside.files)
    return kind


class _Beside(NamedTuple):
    """What is written beside the weights: files by name, and further keys of config.json."""

    files: dict[str, bytes]
    extra: dict[str, Any]


def _beside_an_encoder(model: EncoderConfig, card: "Card") -> _Beside:
    """The model card alone: no run trains an encoder, so nothing of data and of text belongs to it."""
    from hybridnorm_jax.commands.encoder_card import encoder_card

    return _Beside(files={"README.md": encoder_card(model, card).encode()}, extra={})


def _beside_a_decoder(source: Source, card: "Card") -> _Beside:
    from hybridnorm_jax.commands.decoder_card import TRAINING_CONFIG, decoder_card
    from hybridnorm_jax.data.tokens.tokenizer_files import tokenizer_files

    model = source.config.model
    files = {"README.md": decoder_card(source, card).encode()}
    if source.is_trained_run:  # else nothing was trained by this configuration
        files[TRAINING_CONFIG] = to_yaml(source.config).encode()
    separator = source.config.data.separator_id
    if source.tokenizer is not None:
        separator = source.tokenizer.separator_id
        files |= tokenizer_files(source.config.data, source.tokenizer, longest=model.max_positions)
    if card.kind == "safetensors":
        return _Beside(files, extra={})
    # The separator begins a document and ends it.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator)
    files["generation_config.json"] = json.dumps(tokens, indent=2).encode() + b"\n"
    extra: dict[str, Any] = {"bos_token_id": separator, "eos_token_id": separator}
    if model.positions == "rope" and source.knows_training:  # how long texts may be is not known otherwise
        extra["max_position_embeddings"] = source.config.train.seq_len
    return _Beside(files, extra)
