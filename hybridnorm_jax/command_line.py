"""The command lines of train.py and eval.py: what their words mean, what --help answers, how errors end."""

import dataclasses
import errno
import hashlib
import itertools
import json
import operator
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.config import ConfigError, UserError
from hybridnorm_jax.config_files import (
    FIELDS,
    SECTIONS,
    TYPE_WORDS,
    build,
    default,
    gather,
    read_file,
    show,
    without_none,
)
from hybridnorm_jax.distributed import Processes, check_alike
from hybridnorm_jax.run_config import DistributedSection, RunConfig
from hybridnorm_jax.training.goodput import process_began
from hybridnorm_jax.training.stopping import RunStopped

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_FILE = "configs/quickstart.yaml"
DRY_RUN = "--dry-run"
HELP_WIDTH = 120
VALUE_WIDTH = 24
LONGEST_NAME = 120


def parse(arguments: Sequence[str], default_file: str = DEFAULT_FILE) -> RunConfig:
    """The configuration that `[FILE.yaml ...] [key=value ...]` asks for.

    Files are merged first, then overrides; later ones win. Without a file, `default_file` is read, relative to the
    repository. Plugins (run.plugins) are imported. run.name=auto becomes the last file's stem followed by
    -key=value for each override outside run.* and distributed.*, so the same command names the same run.

    Raises:
      ConfigError: one line that names the file or the override and says what would be right.
    """
    files, overrides = _split(arguments)
    if not files:
        files = [str(REPOSITORY / default_file)]
        if not Path(files[0]).is_file():
            raise ConfigError(f"no configuration given, and {files[0]} does not exist: name a YAML file")
    settings = gather([(file, read_file(file)) for file in files], overrides)
    if settings.get("run.name", "auto") == "auto":
        settings["run.name"] = _run_name(Path(files[-1]).stem, overrides)
    return build(settings)


def help_text(arguments: Sequence[str] = ()) -> str:
    """What --help prints: usage, then every key with type, value and meaning, in at most 120 columns.

    Values are the defaults, or those that the given files and overrides set; -h and --help are skipped, so that a
    command line can be passed as it is.

    Raises:
      ConfigError: the arguments cannot be read, or set an unknown key or a wrong type.
    """
    files, overrides = _split([word for word in arguments if word not in ("-h", "--help")])
    title = "value" if files or overrides else "default"
    files = files or [str(REPOSITORY / DEFAULT_FILE)]
    settings = gather([(file, read_file(file)) for file in files], overrides)
    rows = {
        path: (path, _type_name(field.type), show(settings.get(path, default(field))), field.metadata["meaning"])
        for path, field in FIELDS.items()
    }
    widths = [max(len(row[column]) for row in rows.values()) for column in range(2)]
    widths.append(min(VALUE_WIDTH, max(len(row[2]) for row in rows.values())))
    widths.append(HELP_WIDTH - sum(widths) - 2 * (len(widths) + 1))
    lines = [
        "usage: train.py [FILE.yaml ...] [key=value ...] [--dry-run]",
        "",
        "Files are merged in order, then overrides; later ones win. Without a file: configs/quickstart.yaml.",
        "Values are YAML: train.steps=20 optimizer.clip=null data.files=[a.txt,b.txt] data.validation.c4=[c4.npy]",
        "",
        "--dry-run compiles the step for the devices at hand, prints mesh, batches and memory, and ends there.",
        "",
        "Status: 0 done; 2 an error, in one line; 75 told to stop (SIGTERM) and saved, run it again; 130 the same by",
        "Ctrl-C; 76 stalled (train.stall_exit). docs/faults.md says more.",
        "",
        *_table_row(("key", "type", title, "meaning"), widths),
    ]
    for section in (*SECTIONS, ""):
        meaning = SECTIONS[section].__doc__.partition(".")[0] if section else "outside the sections"
        lines += ["", f"{section}: {meaning}".removeprefix(": ")]
        for path, row in rows.items():
            if path.rpartition(".")[0] == section:
                lines += _table_row(row, widths)
    return "\n".join(lines)


def run_train(arguments: Sequence[str]) -> int:
    """`python train.py [FILE.yaml ...] [key=value ...] [--dry-run]`; returns the exit status."""
    words = [word for word in arguments if word != DRY_RUN]
    processes = Processes(words)

    def command() -> None:
        if _wants_help(words):
            print(help_text(words))
            return
        config = parse(words)
        with processes.running(config.distributed):
            check_alike(_written(config))
            if DRY_RUN in arguments:
                from hybridnorm_jax.training.dry_run import dry_run

                dry_run(config)
                return
            from hybridnorm_jax.training.loop import train  # after parsing: JAX takes seconds to import

            train(config, began=process_began())
        if processes.number == 0:
            _say_next(words, config)

    return processes.supervise(lambda: exit_status(command, processes))


def _written(config: RunConfig) -> dict[str, str]:
    """Every key that must be the same in all processes, with its value as text; a cache may be a host's own."""
    kept = [path for path in FIELDS if not path.startswith("distributed.") and path != "data.cache_dir"]
    return {path: show(operator.attrgetter(path)(config)) for path in kept}


def _say_next(arguments: Sequence[str], config: RunConfig) -> None:
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    evaluation = shlex.join([python, "eval.py", f"{config.run.dir}/{config.run.name}"])
    another = shlex.join([python, "train.py", *_other_scheme(arguments, config)])
    print(f"\nNext: {evaluation}\n  or another placement: {another}")


EVAL_USAGE = """usage: eval.py RUN_DIR [key=value ...] [--json]

Prints loss, perplexity and bits per byte of every validation set of a run, from its newest checkpoint; or from one
checkpoint, given as RUN_DIR/checkpoints/STEP. Keys are those of train.py; the model and the tokenizer are the run's.
  eval.batches=8                      only so many batches of each set
  data.validation.c4=[c4/*.npy]       one more set
  mesh.fsdp=1 mesh.tensor=8           by default all devices are on mesh.fsdp
  distributed.coordinator=HOST:PORT   several processes where no cluster is found: see docs/clusters.md
--json prints one JSON object and nothing else on standard output."""


def run_eval(arguments: Sequence[str]) -> int:
    """`python eval.py RUN_DIR [key=value ...] [--json]`; returns the exit status."""
    processes = Processes(arguments)

    def command() -> None:
        words = [word for word in arguments if word != "--json"]
        if _wants_help(words):
            print(EVAL_USAGE)
            return
        if not words or ("=" in Path(words[0]).name and not Path(words[0]).exists()):
            raise ConfigError("eval.py needs a run's directory first, such as runs/quickstart; --help says more")
        with processes.running(_distributed_of(words[1:])):
            from hybridnorm_jax.evaluation.perplexity import table
            from hybridnorm_jax.evaluation.run import evaluate_run

            as_json = "--json" in arguments
            result = evaluate_run(words[0], words[1:], progress=not as_json and processes.number == 0)
        if processes.number != 0:
            return
        if as_json:
            sets = {name: dataclasses.asdict(score) for name, score in result.scores.items()}
            print(json.dumps({"checkpoint": result.checkpoint, "step": result.step, "sets": sets}, indent=2))
        else:
            print(f"{result.checkpoint}\n\n{table(result.scores)}")

    return processes.supervise(lambda: exit_status(command, processes))


def _distributed_of(overrides: Sequence[str]) -> DistributedSection:
    """What is asked here: the run's configuration, which says nothing of these processes, is read when they are up."""
    settings = gather([], overrides)
    return DistributedSection(
        **{path.partition(".")[2]: value for path, value in settings.items() if path.startswith("distributed.")}
    )


def _wants_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def exit_status(command: Callable[[], None], processes: Processes | None = None) -> int:
    """0; or after one line on standard error, 2 for what the caller can mend, and stopping.py's for a stopped run.

    Args:
      processes: of several, only those that Processes.speaks lets speak print the line.
    """
    processes = processes or Processes()

    def say(error: BaseException, line: str) -> None:
        if processes.speaks(error):
            print(processes.label(line), file=sys.stderr)

    try:
        command()
    except UserError as error:
        say(error, f"error: {error}")
        return 2
    except RunStopped as stopped:
        say(stopped, str(stopped))
        return stopped.exit_code
    except OSError as error:
        if error.strerror is None or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        say(error, f"error: {error.filename or 'writing a file'}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _other_scheme(arguments: Sequence[str], config: RunConfig) -> list[str]:
    """The same arguments with another placement, which has no equivalent form."""
    changed = ("model.scheme=", "run.name=", "train.equivalent_", "train.check_invariants=", "distributed.")
    kept = [word for word in arguments if not word.startswith(changed)]
    other = "pre" if config.model.scheme != "pre" else "hybrid_star"
    return [*kept, f"model.scheme={other}"]


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and overrides. The name of a run holds `=`, and so may the path of its config.yaml."""
    files, overrides = [], []
    for word in words:
        if word.endswith((".yaml", ".yml")) and not re.match(r"[\w.]+=", word):
            files.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            raise ConfigError(f"{word}: neither a .yaml file nor key=value; --help lists every key")
    return files, overrides


def _run_name(stem: str, overrides: Sequence[str]) -> str:
    chosen = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    last_words = [path.rpartition(".")[2] for path in FIELDS]
    name = stem
    for path, text in sorted(chosen.items()):
        # checkpoint.every and eval.every would give one name to two runs.
        word = path.rpartition(".")[2]
        if path.partition(".")[0] not in ("run", "distributed"):
            name += f"-{path if last_words.count(word) > 1 else word}={text}"
    plain = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _type_name(hint: Any) -> str:
    kind, optional = without_none(hint)
    return TYPE_WORDS[kind][0] + ("|null" if optional else "")


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row as lines, the cells wrapped to their widths."""
    columns = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        "  ".join(("", *(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))).rstrip()
        for line in itertools.zip_longest(*columns, fillvalue="")
    ]
