"""`hybridnorm tokenize`: turn text into a directory of tokens, ahead of all runs that read it."""

import argparse
import contextlib
import errno
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from typing import NoReturn

from hybridnorm_jax.commands.program import ArgumentParser, again
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.commands.text_files import FILES_HELP, corpus_of, sort, text_section
from hybridnorm_jax.config.data_file_names import MANIFEST, is_tokenized
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.errors import EXIT_CODES, DataError, RunStopped, UserError
from hybridnorm_jax.streams import sturdy_streams
from hybridnorm_jax.whole_files import expanded, is_local

USAGE = """hybridnorm tokenize FILE [FILE ...] --tokenizer T --out DIR [OPTION ...]
                           [data.text_field=NAME] [data.filter=[...]]
                           [data.records=...] [data.chat_template=...]
                           [data.separator=TOKEN]
                           [data.validation_fraction=SHARE]"""
DESCRIPTION = """Writes text as tokens to DIR, with several processes at once. Runs read it:

  hybridnorm tokenize 'books/*.jsonl.zst' --tokenizer tokenizer.json --out DIR
  hybridnorm train 550m 'data.files=[DIR]' data.tokenizer=tokenizer.json

data.validation_fraction of the documents is held out, the same documents as
where a run reads the text itself. The files in DIR do not depend on the number
of processes. After a kill the same command goes on. DIR/manifest.json says what
the tokens were made of; beside each file of tokens lies the index of its
document ends."""
# How a whole directory gets to a remote place, from which runs read it.
COPY = {
    "s3": "aws s3 sync DIR {url}",
    "gs": "gcloud storage rsync --recursive DIR {url}",
    "hf": "hf upload OWNER/NAME DIR PATH --repo-type dataset",
}
# Fewer would make millions of files of what a run reads.
SMALLEST_SHARD, LARGEST_SHARD = 1 << 10, 1 << 40
MOST_PROCESSES = 1024


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm tokenize FILE ... --tokenizer T --out DIR [OPTION ...] [data.KEY=value ...]`."""
    check_syntax("tokenize", arguments)
    others, keys = sort("tokenize", arguments)
    options = _parser().parse_intermixed_args(others)
    _check(options)
    section = text_section(options.files, keys, tokenizer=options.tokenizer)
    with sturdy_streams(), _stopped_by_signals(), _refusals(options.out):
        _tokenize(options, section)


def _parser() -> ArgumentParser:
    from hybridnorm_jax.data.tokens.token_shards import SHARD_TOKENS

    parser = ArgumentParser("hybridnorm tokenize", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="+", help=FILES_HELP)
    parser.add_argument("--tokenizer", metavar="T", required=True, help="bytes, or the path of a tokenizer.json")
    parser.add_argument("--out", metavar="DIR", required=True, help="new directory, or one that was begun so")
    parser.add_argument("--processes", metavar="N", type=int, help="that tokenize (default: one for each core)")
    parser.add_argument(
        "--shard-tokens",
        metavar="N",
        type=int,
        default=SHARD_TOKENS,
        help=f"tokens after which a file ends with its document (default: {SHARD_TOKENS:,})",
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="leave out documents whose whole text came before"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.processes = cores if options.processes is None else options.processes
    if not 1 <= options.processes <= MOST_PROCESSES:
        raise UserError(f"--processes {options.processes}: must be from 1 to {MOST_PROCESSES:,}")
    if not SMALLEST_SHARD <= options.shard_tokens <= LARGEST_SHARD:
        raise UserError(f"--shard-tokens {options.shard_tokens}: must be from {SMALLEST_SHARD:,} to {LARGEST_SHARD:,}")
    if not options.out:
        raise UserError("--out '': an empty name; name a directory")
    if not is_local(options.out):
        copy = COPY.get(options.out.partition("://")[0])
        right = "name a directory of this machine" + (f", and copy it when it is whole: {copy}" if copy else "")
        raise UserError(f"--out {options.out}: tokens are written to a local disk; {right.format(url=options.out)}")
    out = pathlib.Path(expanded(options.out))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a directory")
    if out.is_dir() and any(out.iterdir()) and not is_tokenized(out):
        raise UserError(f"--out {options.out}: holds other files; name a new directory")
    options.out = out


def _tokenize(options: argparse.Namespace, section: DataSection) -> None:
    # Only now: they take a second to import.
    from hybridnorm_jax.data.tokens.token_workers import Processes
    from hybridnorm_jax.data.tokens.tokenized_directory import open_tokenized
    from hybridnorm_jax.data.tokens.tokenizers import load_tokenizer
    from hybridnorm_jax.data.tokens.tokenizing import Job, check_same_inputs, write_tokens

    corpus, tokenizer = corpus_of(section), load_tokenizer(section)
    job = Job(corpus, tokenizer, section.validation_fraction, options.drop_duplicates, options.shard_tokens)
    if (options.out / MANIFEST).is_file():
        manifest = open_tokenized(options.out).manifest
        check_same_inputs(options.out, manifest.inputs, job.inputs())
        print(f"{options.out}: is whole already; nothing is done")
    else:
        with (
            _kept_unless_empty(options.out),
            Processes(tokenizer, section.separator, options.processes) as processes,
        ):
            manifest = write_tokens(options.out, job, processes, shown=True)
    train, held_out = (manifest.splits[split] for split in ("train", "validation"))
    total = train.tokens + held_out.tokens
    print(f"{options.out}: {total:,} tokens of {manifest.documents:,} documents, {manifest.duplicates:,} dropped")
    for name, counts in (("train", train), ("held out", held_out)):
        shards = len(manifest.shards["train" if name == "train" else "validation"])
        share = f"{counts.tokens / max(total, 1):.2%}"
        print(f"  {name:<8} {counts.tokens:>16,} tokens ({share}), {counts.bytes:,} bytes of text, {shards} files")
    _say_next(options, section, tokenizer.vocab_size)


@contextlib.contextmanager
def _kept_unless_empty(out: pathlib.Path) -> Iterator[None]:
    """Make the directory. If the text is refused before any of its tokens are there, one that is new goes again."""
    try:
        out.mkdir(parents=True)
        is_new = True
    except FileExistsError:
        is_new = False
    try:
        yield
    except DataError:
        if is_new and not any(out.glob("*.npy")):
            shutil.rmtree(out)
        raise


def _say_next(options: argparse.Namespace, section: DataSection, vocab_size: int) -> None:
    keys = [f"data.files=[{options.out}]", f"data.tokenizer={section.tokenizer}", f"model.vocab_size={vocab_size}"]
    if section.validation_fraction != DataSection().validation_fraction:
        keys.append(f"data.validation_fraction={section.validation_fraction}")
    print(f"\nNext:\n  train on it\n    {again(['train', 'quickstart', *keys])}")


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the command in one line: what is on the disk is kept."""

    def stop(number: int, _: object) -> NoReturn:
        raise RunStopped(EXIT_CODES[number], "what was tokenized is kept")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _refusals(out: pathlib.Path) -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left" if full else f"cannot be written ({error.strerror or error})"
        right = "make room there, and the same command goes on" if full else "name another directory"
        raise DataError(f"--out {out}: {reason}; {right}") from error
