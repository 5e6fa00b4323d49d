"""`hybridnorm generate`: go on from a text, and print what the model writes as it comes."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.commands.syntax import GENERATE_RUN_KEYS, check_syntax
from hybridnorm_jax.config.key_help import meaning
from hybridnorm_jax.config.key_lookup import default
from hybridnorm_jax.config.key_values import show
from hybridnorm_jax.config.plugins import import_plugins
from hybridnorm_jax.config.run_config import MeshSection, RunConfig
from hybridnorm_jax.config.yaml_files import gather, named_plugins, take
from hybridnorm_jax.config_fields import check, key
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.file_formats import format_of
from hybridnorm_jax.generation.sampling import Sampling

TEXTS = ("--prompt", "--file")
# A longer prompt is a slip of the hand.
MOST_BYTES = 16 << 20
DEFAULT_LENGTH = 256

USAGE = """usage: hybridnorm generate RUN_OR_DIR [--prompt TEXT | --file FILE]
                           [key=value ...] [--json]

Goes on from a text, and prints what the model writes as it comes, up to the
end of a document. RUN_OR_DIR is a run, one of its checkpoints such as
RUN/checkpoints/000500, or a Hugging Face directory (needs the extra hf).

  hybridnorm generate runs/quickstart --prompt 'def ' temperature=0.8

--prompt TEXT  the text; '' begins a document
--file FILE    the text is in FILE, in UTF-8
--json         print one JSON object for each text, and nothing else on standard
               output

Without either the text comes from standard input. In a terminal each line that
you type is one.

Its own keys are these:
{keys}

Of the keys of `hybridnorm train` it takes:

  mesh.tensor=4 mesh.fsdp=2
      place the parameters on several devices; default: on one
  model.dtype=bfloat16
      compute in another dtype than the run
  data.tokenizer=FILE data.separator=TOKEN
      the tokenizer.json of the model, where its directory names none
  run.plugins=[...]
      plugins of the run, which are imported only if you name them"""


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Sampling):
    """What is written, and how its tokens are chosen."""

    seed: int = key(0, "another one gives another text, where temperature is not 0", at_least=0, at_most=2**32 - 1)
    max_new_tokens: int | None = key(
        None,
        f"tokens that are written; null: {DEFAULT_LENGTH}, or fewer where the model knows no texts that long",
        at_least=1,
        at_most=100_000_000,
    )
    stop: tuple[str, ...] = key((), 'the text ends before any of these, such as ["\\n\\n"]')
    stop_ids: tuple[int, ...] = key((), "so it does before these tokens", at_least=0, at_most=2**31 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check("" not in self.stop, "stop", show(self.stop), "a text in it is empty")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
      text: of its tokens, up to where it ended.
      tokens: how many they are.
      ended: `stop`: before a stop string; `token`: at the end of a document, or at one of stop_ids; `length`.
    """

    text: str
    tokens: int
    ended: str


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm generate RUN_OR_DIR [--prompt TEXT | --file FILE] [key=value ...] [--json]`."""
    texts, arguments = _split_texts(arguments)
    check_syntax("generate", arguments)
    if wants_help(arguments):
        print(USAGE.format(keys=_keys()))
        return
    settings = [argument for argument in arguments if argument != "--json"]
    if not settings:
        raise UserError("generate: name the run directory first, such as runs/quickstart; --help says more")
    path, settings = settings[0], settings[1:]
    options, overrides = take(GenerateOptions, settings)
    for argument in overrides:
        if argument.partition("=")[0] not in GENERATE_RUN_KEYS:
            raise UserError(f"{argument}: generate takes one directory, and then key=value only")
    prompt = _named_text(texts)
    model = _Model(path, overrides)
    prompts = [prompt] if prompt is not None else _typed_texts(as_json="--json" in arguments)
    for text in prompts:
        _answer(model, text, options, as_json="--json" in arguments)


def _answer(model: "_Model", prompt: str, options: GenerateOptions, *, as_json: bool) -> None:
    """Print what the model writes after one text."""
    from hybridnorm_jax.generation.streaming import without_controls

    is_terminal = sys.stdout.isatty()

    def show_piece(piece: str) -> None:
        print(without_controls(piece) if is_terminal else piece, end="", flush=True)

    written = model.go_on(prompt, options, (lambda piece: None) if as_json else show_piece)
    if as_json:
        print(json.dumps({"prompt": prompt, **written._asdict()}, indent=2))
    elif not written.text.endswith("\n"):
        print(flush=True)


class _Model:
    """A model with its tokenizer, ready to write.

    Raises:
      UserError: it cannot be read, has no tokenizer, or one of another vocabulary.
    """

    def __init__(self, path: str, overrides: Sequence[str]):
        # After parsing: JAX takes seconds to import.
        import jax

        from hybridnorm_jax.commands.convert import HUGGING_FACE, read_directory
        from hybridnorm_jax.data import load_tokenizer
        from hybridnorm_jax.mesh.device_mesh import make_mesh
        from hybridnorm_jax.mesh.shardings import tree_shardings
        from hybridnorm_jax.training.program import check_precision

        import_plugins(named_plugins(overrides))
        asked = gather([], overrides)
        sizes = _section(asked, "mesh")
        mesh = make_mesh(MeshSection(**({"data": 1} | sizes)).sizes) if sizes else None
        source = read_directory(path, mesh=mesh)
        is_foreign = source.kind == HUGGING_FACE
        self.config = dataclasses.replace(source.config.model, **_section(asked, "model"))
        check_precision(self.config)
        self.params = source.params
        if is_foreign and mesh is not None:
            self.params = jax.device_put(source.params, tree_shardings(source.params, mesh))
        # Texts that are longer than those it was trained on: of other people's models only a table of positions says.
        self.longest = self.config.max_positions if is_foreign else source.config.train.seq_len
        data = dataclasses.replace(source.config.data, **_section(asked, "data"))
        if "data.tokenizer" not in asked and _names_no_tokenizer(source.config, is_foreign):
            raise UserError(f"{path}: there is no tokenizer.json with it; name the model's, data.tokenizer=FILE")
        self.tokenizer = load_tokenizer(data, needs_separator=False)
        rows = self.config.vocab_size
        if self.tokenizer.vocab_size > rows:
            wrong = f"{self.tokenizer.vocab_size:,} tokens, but the model in {path} knows {rows:,}"
            raise UserError(f"data.tokenizer={data.tokenizer}: {wrong}; name the tokenizer that it was trained with")

    def go_on(self, prompt: str, options: GenerateOptions, show_piece: Any) -> Written:
        """Write after a text; each piece of what is written is shown as it comes."""
        from hybridnorm_jax.generation.generate import generate
        from hybridnorm_jax.generation.streaming import TextStream

        separator = self.tokenizer.separator_id
        tokens = [int(token) for token in self.tokenizer.encode(prompt)]
        if not tokens and separator is None:
            raise UserError("the prompt has no token, and the tokenizer has no separator to begin with; give some text")
        tokens = tokens or [separator]
        stop_ids = {*options.stop_ids, *([] if separator is None else [separator])}
        stream = TextStream(self.tokenizer, after=tokens, stop=options.stop)
        pieces: list[str] = []

        def add(piece: str) -> None:
            pieces.append(piece)
            show_piece(piece)

        def listen(new: list[Any]) -> bool:
            add(stream.feed([token for token in new[0] if token not in stop_ids]))
            return stream.is_stopped

        (written,) = generate(
            self.config,
            self.params,
            [tokens],
            max_new_tokens=self._length(len(tokens), options.max_new_tokens),
            sampling=options.sampling,
            stop_ids=sorted(stop_ids),
            seeds=options.seed,
            on_tokens=listen,
        )
        add(stream.finish())
        at_token = len(written) > 0 and int(written[-1]) in stop_ids
        ended = "stop" if stream.is_stopped else "token" if at_token else "length"
        return Written("".join(pieces), len(written), ended)

    def _length(self, prompt: int, asked: int | None) -> int:
        """How many tokens are written after so many."""
        if self.longest is None:
            return asked or DEFAULT_LENGTH
        left = self.longest - prompt + 1  # the last token is not read
        length = asked or (min(DEFAULT_LENGTH, left) if left > 0 else DEFAULT_LENGTH)
        if length > left and self.config.max_positions is None:
            trained = f"the model was trained on texts of {self.longest:,} tokens"
            print(f"note: {trained}; what it writes after so many is worse", file=sys.stderr, flush=True)
        return length


def _section(settings: dict[str, Any], section: str) -> dict[str, Any]:
    """The keys of one section, without its name."""
    return {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{section}.")}


def _names_no_tokenizer(config: RunConfig, is_foreign: bool) -> bool:
    """Whether `bytes`, the default of data.tokenizer, says nothing of the tokens of this model."""
    return config.data.tokenizer == "bytes" and (is_foreign or config.data.source == "tokens")


def _split_texts(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of --prompt and --file, which may look like anything, and all other arguments."""
    texts: dict[str, str] = {}
    others, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in TEXTS:
            others.append(argument)
            continue
        if not equals and (value := next(rest, None)) is None:
            raise UserError(f"{name}: needs a value, {name} {'FILE' if name == '--file' else 'TEXT'}")
        if texts:
            raise UserError(f"{name}: beside {next(iter(texts))}; give one of the two, once")
        texts[name] = value
    return texts, others


def _named_text(texts: dict[str, str]) -> str | None:
    """The text that --prompt or --file gives; None where neither is there."""
    if "--file" not in texts:
        return texts.get("--prompt")
    name = texts["--file"]
    try:
        if Path(name).exists() and not Path(name).is_file():
            raise UserError(
                f"--file {name}: cannot be read: {'a directory' if Path(name).is_dir() else 'no plain file'}"
            )
        with open(name, "rb") as file:
            return _text(file.read(MOST_BYTES + 1), f"--file {name}")
    except OSError as error:
        raise UserError(f"--file {name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--file {name}: cannot be read: {error}") from error  # NUL in a path


def _typed_texts(*, as_json: bool) -> Iterator[str]:
    """The text on standard input; in a terminal every line, until the end of the input."""
    if not sys.stdin.isatty():
        yield _text(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input")
        return
    import readline  # noqa: F401  lets input() edit a line

    while True:
        try:
            yield input("" if as_json or not sys.stdout.isatty() else "> ")
        except EOFError:
            return


def _text(content: bytes, what: str) -> str:
    if len(content) > MOST_BYTES:
        raise UserError(f"{what}: too long for a prompt, which has at most {MOST_BYTES:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = format_of(content)
        wrong = f"{found.name}, not text" if found else f"not UTF-8 text ({error.reason} at byte {error.start:,})"
        raise UserError(f"{what}: {wrong}") from error


def _keys() -> str:
    """The command's own keys with their meanings, in at most 80 columns."""
    lines = []
    fields = sorted(dataclasses.fields(GenerateOptions), key=lambda field: field.name != "max_new_tokens")
    for field in fields:
        lines.append(f"\n  {field.name}={show(default(field))}")
        lines += textwrap.wrap(meaning(field), 80, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
