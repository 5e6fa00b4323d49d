"""`hybridnorm generate`: text from a run or a Hugging Face directory, as it is written."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.commands.syntax import HELP, SYNTAX, check_syntax
from hybridnorm_jax.commands.which_parameters import add_option
from hybridnorm_jax.config.key_help import meaning
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import import_plugins
from hybridnorm_jax.config.yaml_files import named_plugins
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.generation.sampling import Sampling, fault_of_seed
from hybridnorm_jax.model.config_sizes import LONGEST_CONTEXT

if TYPE_CHECKING:
    from hybridnorm_jax.commands.saved_model import SavedModel
    from hybridnorm_jax.data import Tokenizer
    from hybridnorm_jax.generation.prompts import Prompts
    from hybridnorm_jax.generation.text import Written

# Tokens that are written where nobody says how many.
MANY = 256
# Options whose value may be any text.
TEXTS = ("--prompt", "--file", "--stop")

USAGE = """hybridnorm generate RUN_OR_DIR [--prompt TEXT | --file FILE] [OPTION ...]
       [run.plugins=[...]]"""
DESCRIPTION = """Goes on from a prompt, and prints the text while it is written. Without a prompt
it reads one from standard input; on a terminal you type one prompt after
another.

The prompt begins a document. The text ends with the document, at a stop string,
or after as many tokens as were asked for. Without --temperature the likeliest
token is always taken; with it tokens are drawn at random.

run.plugins=[...] names the plugins of a run, which are imported only if you
name them."""


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm generate RUN_OR_DIR [OPTION ...] [run.plugins=[...]]`."""
    arguments = _with_texts(arguments)
    check_syntax("generate", arguments)
    options = _parser().parse_args([each for each in arguments if not each.startswith(f"{PLUGINS}=")])
    options.plugins = named_plugins(arguments)
    if options.max_tokens is not None and not 1 <= options.max_tokens <= LONGEST_CONTEXT:
        raise UserError(f"--max-tokens {options.max_tokens}: must be at least 1 and at most {LONGEST_CONTEXT:,}")
    if (wrong := fault_of_seed(options.seed)) is not None:
        raise UserError(f"--seed {options.seed}: {wrong}")
    if not all(options.stop):
        raise UserError("--stop: an empty text would end every text at once; name the text to stop at")
    generate(options, _sampling(options))


def _with_texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, with each text in one with its option: it may look like an option or a key, and is none.

    An option's own name is no text, so that a text that was forgotten is missed.
    """
    joined, rest = [], iter(arguments)
    for argument in rest:
        value = next(rest, None) if argument in TEXTS else None
        if value is None:
            joined.append(argument)
        elif value in (*SYNTAX["generate"].options, *HELP):
            joined += [argument, value]
        else:
            joined.append(f"{argument}={value}")
    return joined


def _sampling(options: argparse.Namespace) -> Sampling:
    try:
        return Sampling(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)})
    except ConfigError as error:
        name, equals, rest = str(error).partition("=")
        raise UserError(f"{_option(name)}{equals}{rest}") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm generate", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "model",
        metavar="RUN_OR_DIR",
        help="a run directory, one checkpoint of a run, or a Hugging Face directory (config.json, safetensors; needs "
        "the extra hf)",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="what the text goes on from; may be empty")
    given.add_argument("--file", metavar="FILE", help="a file of UTF-8 text that holds the prompt")
    parser.add_argument("--max-tokens", metavar="N", type=int, help=f"most tokens to write (default {MANY})")
    for field in dataclasses.fields(Sampling):
        kind = int if field.name == "top_k" else float
        parser.add_argument(_option(field.name), metavar="N", type=kind, default=field.default, help=_help(field))
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed draws another text (default 0)")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="the model's tokenizer.json, or bytes; needed where the model brings none",
    )
    parser.add_argument(
        "--chat-template",
        metavar="T",
        help="the prompt is what a user says, and the text an answer: chatml, or the file of a template that you trust",
    )
    add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each prompt")
    return parser


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(field: dataclasses.Field) -> str:
    default = "off" if field.default is None else field.default
    return f"{meaning(field)} (default {default})"


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """The prompts, one after another; those that are not typed are read at once."""
    if options.prompt is not None:
        return iter([options.prompt])
    if options.file is not None:
        return iter([_read(options.file)])
    if _is_typing(options):
        return _typed()
    try:
        return iter(["" if sys.stdin is None else _checked(sys.stdin.read())])
    except UnicodeDecodeError as error:
        raise UserError("standard input: not UTF-8 text") from error


def _is_typing(options: argparse.Namespace) -> bool:
    """Whether somebody types the prompts, on a terminal."""
    return options.prompt is None and options.file is None and sys.stdin is not None and sys.stdin.isatty()


def _checked(text: str) -> str:
    """What was read from standard input, where Python may stand surrogates for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("standard input: not UTF-8 text") from error
    return text.removeprefix("\ufeff")


def _typed() -> Iterator[str]:
    """Lines, until the end of input."""
    print("Type a prompt and press Enter; Ctrl-D ends.", file=sys.stderr)
    # Where standard output is no terminal, it is for what the model writes alone.
    out = sys.stdout if sys.stdout.isatty() else sys.stderr
    while True:
        try:
            print("> ", end="", file=out, flush=True)
            yield _checked(input())
        except (UserError, UnicodeDecodeError) as error:
            _say_and_go_on(error)
        except EOFError:
            print(file=out)
            return


def _say_and_go_on(error: UserError | UnicodeDecodeError) -> None:
    """Say what is wrong with a prompt that was typed: the next one may be right."""
    wrong = "standard input: not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
    print(f"error: {wrong}", file=sys.stderr, flush=True)


def _read(file: str) -> str:
    path = Path(file).expanduser()
    if path.exists() and not path.is_file():
        raise UserError(f"--file {file}: no regular file; name a file of UTF-8 text")
    try:
        # As training reads a file: without a byte order mark, and with the line ends that it has.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file {file}: not UTF-8 text") from error


def generate(options: argparse.Namespace, sampling: Sampling) -> None:
    """Read the prompts and the model, and write after each prompt."""
    from hybridnorm_jax.commands.program_cache import keep_programs
    from hybridnorm_jax.commands.saved_model import read_directory
    from hybridnorm_jax.generation.ready_parameters import ready
    from hybridnorm_jax.generation.text import write_text
    from hybridnorm_jax.model.encoder_config import check_decoder

    prompts = _prompts(options)
    import_plugins(options.plugins)
    keep_programs()
    source = read_directory(options.model, plain=options.plain)
    check_decoder(source.config.model, options.model, "generate text")
    tokenizer = _tokenizer(source, options.tokenizer)
    written_down = _written_down(options.chat_template, source, tokenizer)
    # Once for all prompts: those of a Hugging Face directory are not on a device yet.
    params = ready(source.config.model, source.params)
    show = None if options.json else _show(sys.stdout.isatty())
    for prompt in prompts:
        try:
            (written,) = write_text(
                source.config.model,
                params,
                tokenizer,
                [prompt],
                max_new_tokens=_most(options.max_tokens, len(written_down.tokens(prompt)), source),
                sampling=sampling,
                stop=options.stop,
                seeds=[options.seed],
                on_text=show,
                written_down=written_down,
            )
        except UserError as error:
            if not _is_typing(options):
                raise
            _say_and_go_on(error)
            continue
        print(_as_json(prompt, written) if options.json else "", flush=True)


def _as_json(prompt: str, written: "Written") -> str:
    line = {"prompt": prompt, "text": written.text, "tokens": len(written.tokens), "ended": written.ended}
    return json.dumps(line)


def _show(is_terminal: bool) -> Callable[[list[str]], None]:
    """Prints new text; on a terminal without what would move its cursor or change its colors."""
    from hybridnorm_jax.generation.text_sample import harmless

    def show(new: list[str]) -> None:
        (text,) = new
        print(harmless(text) if is_terminal else text, end="", flush=True)

    return show


def _tokenizer(source: "SavedModel", named: str | None) -> "Tokenizer":
    """The tokenizer that is named, or the model's own.

    Raises:
      UserError: see own_tokenizer; or there is none.
    """
    from hybridnorm_jax.commands.own_tokenizer import own_tokenizer

    model, data, is_named = source.config.model, source.config.data, named is not None
    if named is not None:
        data = dataclasses.replace(data, tokenizer=named, separator="")
    found = own_tokenizer(data, source.trained_on, vocab_size=model.vocab_size, where=source.path, is_named=is_named)
    if found is None:
        right = "name its tokenizer.json, or bytes, with --tokenizer"
        raise UserError(f"{source.path}: no tokenizer is known to belong to it; {right}")
    return found


def _written_down(template: str | None, source: "SavedModel", tokenizer: "Tokenizer") -> "Prompts":
    """What is made of the prompts: the beginning of a document or, with a template, a question."""
    from hybridnorm_jax.data.text.chat_templates import load_template
    from hybridnorm_jax.generation.prompts import Documents, Questions

    data = source.config.data
    if template is None:
        return Documents(tokenizer, follows_separator=data.follows_separator)
    # A template says how a conversation begins; before that stands a separator only where the run has learned it so.
    follows_separator = data.follows_separator and data.records == "messages"
    return Questions(tokenizer, load_template(template, what=f"--chat-template {template}"), follows_separator)


def _most(asked: int | None, length: int, source: "SavedModel") -> int:
    """How many tokens to write: as many as are asked for, or MANY and no more than a model has positions for.

    Args:
      length: tokens of the prompt.
    """
    if asked is not None:
        return asked
    model, most = source.config.model, MANY
    for limit in (model.max_positions, model.length_of_short_factors):
        # A prompt beyond the second of them is beyond it for good; beyond the first, the request is refused.
        if limit is not None and (length <= limit or limit == model.max_positions):
            most = min(most, limit - length + 1)  # the last token is written, but not read
    return max(1, most)
