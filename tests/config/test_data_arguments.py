"""Data files among the arguments of a command."""

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.errors import ConfigError


def test_files_of_data_set_source_and_files():
    config = parse(["book.txt", "my, odd [name].jsonl.gz", "train.steps=3"])
    assert config.data.source == "text"
    assert config.data.files == ("book.txt", "my, odd [name].jsonl.gz")
    assert config.train.steps == 3
    assert config.model == parse([]).model
    named = parse(["151m", "a.NPY"])
    assert named.data.source == "tokens"
    assert named.model == parse(["151m", "data.files=[b.npy]"]).model


def test_the_source_that_is_asked_for_wins_over_what_the_name_says():
    assert parse(["data.source=tokens", "book.txt"]).data.source == "tokens"


def test_text_and_tokens_together_are_refused():
    with pytest.raises(ConfigError, match="names of text and of token files; a run reads one kind"):
        parse(["book.txt", "a.npy"])
