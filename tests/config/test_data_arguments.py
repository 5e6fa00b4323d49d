"""Data files among the arguments of a command."""

import pytest

from hybridnorm_jax.config.arguments import parse, sort
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


def test_an_override_wins_over_a_file_among_the_arguments():
    assert sort(["data.source=tokens", "book.txt"]).overrides[-1] == "data.source=tokens"


def test_text_and_tokens_together_are_refused():
    with pytest.raises(ConfigError, match=r"^book\.txt a\.npy: one holds text and the other tokens"):
        sort(["book.txt", "a.npy"])
