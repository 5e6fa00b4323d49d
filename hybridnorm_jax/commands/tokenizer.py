"""`hybridnorm tokenizer train`: learn a vocabulary from text."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hybridnorm_jax.commands.program import ArgumentParser, again, subcommand
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.commands.text_files import FILES_HELP, corpus_of, sort, text_section
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.streams import can_redraw, sturdy_streams
from hybridnorm_jax.whole_files import expanded, write_whole

SEPARATOR = "<|endoftext|>"
USAGE = """usage: hybridnorm tokenizer train FILE [FILE ...] --vocab-size N --out FILE

Learns a vocabulary of byte pairs from text.
`hybridnorm tokenizer train --help` says more."""
TRAIN_USAGE = """hybridnorm tokenizer train FILE [FILE ...] --vocab-size N --out FILE
                                  [data.text_field=NAME] [data.filter=[...]]
                                  [data.separator=TOKEN]
                                  [data.validation_fraction=SHARE]"""
DESCRIPTION = f"""Writes a tokenizer.json: byte-level byte-pair encoding (BPE), as GPT-2 has it.
Every text can be written with it, because all bytes are tokens. Id 0 ends a
document; data.separator names its token ({SEPARATOR}). What
data.validation_fraction holds out is not learned from. The same text gives the
same file. Needs the extra hf.

  hybridnorm tokenizer train 'books/*.txt' --vocab-size 32000 --out t.json
  hybridnorm train 'books/*.txt' data.tokenizer=t.json model.vocab_size=32000"""


def run(arguments: Sequence[str]) -> int | None:
    """`hybridnorm tokenizer train FILE ... --vocab-size N --out FILE [data.KEY=value ...]`."""
    if subcommand("tokenizer", arguments, ["train"], USAGE) is None:
        return 0 if arguments else 2
    rest = arguments[1:]
    check_syntax("tokenizer train", rest)
    others, keys = sort("tokenizer train", rest)
    with sturdy_streams():
        _train(_parser().parse_intermixed_args(others), keys)
    return None


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm tokenizer train", usage=TRAIN_USAGE, description=DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="+", help=FILES_HELP)
    parser.add_argument("--vocab-size", metavar="N", type=int, required=True, help="tokens, with the 256 bytes")
    parser.add_argument("--out", metavar="FILE", required=True, help="new file, such as tokenizer.json")
    return parser


def _train(options: argparse.Namespace, keys: Sequence[str]) -> None:
    import sys

    from hybridnorm_jax.data.tokens.tokenizer_training import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, train_tokenizer
    from hybridnorm_jax.data.tokens.tokenizers import HuggingFaceTokenizer

    if not SMALLEST_VOCABULARY <= options.vocab_size <= LARGEST_VOCABULARY:
        right = f"must be from {SMALLEST_VOCABULARY}, the bytes and the separator, to {LARGEST_VOCABULARY:,}"
        raise UserError(f"--vocab-size {options.vocab_size}: {right}")
    out = Path(expanded(options.out))
    if out.exists():
        raise UserError(f"--out {options.out}: is there already; name a new file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: there is no directory {out.absolute().parent}; make it first")
    section = text_section(options.files, keys)
    content = train_tokenizer(
        corpus_of(section),
        vocab_size=options.vocab_size,
        separator=section.separator or SEPARATOR,
        fraction=section.validation_fraction,
        asked="tokenizer train",
        shown=can_redraw(sys.stderr),
    )
    tokenizer = HuggingFaceTokenizer(
        options.out, content.encode(), section.separator or SEPARATOR, needs_separator=True
    )
    write_whole(out, content)
    fewer = f", all that the text has; {options.vocab_size:,} were asked for"
    print(f"{out}: {tokenizer.vocab_size:,} tokens{fewer if tokenizer.vocab_size < options.vocab_size else ''}")
    call = ["tokenize", *options.files, "--tokenizer", options.out, "--out", "DIR"]
    print(f"\nNext:\n  tokenize text with it\n    {again(call)}")
