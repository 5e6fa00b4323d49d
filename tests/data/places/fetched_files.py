"""For tests of remote files: their content, a directory of tokens to copy, and the one line of what is refused."""

import json
import os

import numpy as np
import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.places.remote_file import readable
from hybridnorm_jax.data.text.sources import section_corpus
from hybridnorm_jax.data.tokens.token_workers import ThisProcess
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens

MIB = 1 << 20


def content_of(place) -> bytes:
    with open(readable(place), "rb") as stream:
        return stream.read()


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(copies) -> list[str]:
    """The folders of copies, whole or not."""
    return [name for name in os.listdir(copies._folder()) if name not in ("locks", "owners")]


def written(directory, *, records="text"):
    """A small directory: several shards of both splits; of prompts only what answers them is learned."""
    directory.mkdir()
    text = directory.parent / f"{directory.name}.jsonl"
    field = "completion" if records == "prompt" else "text"
    lines = [{"prompt": f"ask {number}", field: f"answer {number} " * (number % 7 + 1)} for number in range(120)]
    text.write_text("\n".join(json.dumps(line) for line in lines))
    corpus = section_corpus(DataSection(source="text", files=(str(text),), records=records), "data.files")
    job = Job(corpus, ByteTokenizer(), 0.2, shard_tokens=700)
    manifest = write_tokens(directory, job, ThisProcess(ByteTokenizer()), shown=False)
    assert min(len(shards) for shards in manifest.shards.values()) > 1
    return directory
