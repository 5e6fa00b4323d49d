"""How fast `hybridnorm tokenize` is beside the library `tokenizers` alone, with the same number of threads.

    python benchmarks/tokenizing.py --tokenizer tokenizer.json [--megabytes 40] [--rounds 3] [--processes 2]

The text is the standard library of this Python, repeated, as JSON lines. Each round measures both, one after the other,
in one process, so that what else the machine does disturbs both alike. The library's part is `encode_batch_fast` of
512 documents at once, which it spreads over its threads, with the texts in memory and the ids thrown away; ours reads
the file, tokenizes, and writes tokens, index and manifest.

The ratio of the times that a clock shows counts the start of the processes. Where other programs run, it favours
whoever has more processes. The ratio of processor time does not, and leaves that start out: it is that of a machine
whose cores are all busy.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from typing import NamedTuple

import tokenizers

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.text.sources import stdlib_corpus, text_corpus
from hybridnorm_jax.data.tokens.token_workers import Processes
from hybridnorm_jax.data.tokens.tokenizers import load_tokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens

TOGETHER = 512


def main() -> None:
    """Measure, and print megabytes a second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(options.megabytes * 1_000_000)
        file = pathlib.Path(folder, "text.jsonl")
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for number in range(options.rounds):
            library = _library(options.tokenizer, texts)
            ours = _ours(options, file, pathlib.Path(folder, str(number)))
            ratios.append(Times(library.clock / ours.clock, library.processor / ours.processor))
            print(
                f"library {megabytes / library.clock:.2f} MB/s, ours {megabytes / ours.clock:.2f} MB/s, ratio "
                f"{ratios[-1].clock:.2f}; of processor time {ratios[-1].processor:.2f}",
                flush=True,
            )
    clock, processor = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"median ratio {clock:.2f}, of processor time {processor:.2f}; {options.processes} processes")


class Times(NamedTuple):
    """Seconds that a clock shows, and seconds that all cores together have worked."""

    clock: float
    processor: float


def _texts(size: int) -> list[str]:
    corpus, texts = stdlib_corpus(), []
    for file in itertools.cycle(corpus.files):
        for document in corpus.documents(file):
            texts.append(document.text)
            size -= document.num_bytes
        if size <= 0:
            return texts


def _library(path: str, texts: list[str]) -> Times:
    tokenizer = tokenizers.Tokenizer.from_file(path)
    began, worked = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), TOGETHER):
        tokenizer.encode_batch_fast(texts[start : start + TOGETHER], add_special_tokens=False)
    return Times(time.perf_counter() - began, time.process_time() - worked)


def _ours(options: argparse.Namespace, file: pathlib.Path, out: pathlib.Path) -> Times:
    tokenizer = load_tokenizer(DataSection(tokenizer=options.tokenizer))
    began, worked = time.perf_counter(), time.process_time()
    out.mkdir()
    with Processes(tokenizer, "", options.processes) as processes:
        write_tokens(out, Job(text_corpus("FILE", [str(file)], "text"), tokenizer, 0.02), processes, shown=False)
        clock = time.perf_counter() - began
        return Times(clock, time.process_time() - worked + processes.processor_seconds())


if __name__ == "__main__":
    main()
