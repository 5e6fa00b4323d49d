"""Values in messages are spelled as they are typed: what is read of them again is the same value."""

import dataclasses

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.yaml_files import gather
from hybridnorm_jax.config_fields import check, spelled
from hybridnorm_jax.errors import ConfigError

TEXTS = [
    *("plain", "a b", "1", "007", "no", "null", "~", "Null", "true", "", " ends ", "it's", "'quoted'", '"quoted"'),
    *("a, b", "[a]", "{a: b}", "a: b", "a #b", "#", "*/router/kernel", "&x", "!tag", "%", "@list.txt", "- a", "?", "é"),
    *("line\nline", "\ttab", "back\\slash", "language == en", "gs://bucket/a*.txt", "\u200b"),
]
# A key of every type of values, and values of it.
VALUES = {
    "data.tokenizer": TEXTS,
    "train.sample_prompt": [None, *TEXTS],
    "data.files": [(), ("a",), ("a", "b"), tuple(TEXTS)],
    "train.profile": [True, False],
    "train.steps": [1, 20, 10**9],
    "eval.batches": [None, 3],
    "optimizer.eps": [1e-8, 0.1, 1.0, 3e-05],
    "optimizer.clip": [None, 0.5],
    "optimizer.rate_factors": [{}, {"*/router/kernel": 0.1, "head/*": 2.0}, dict.fromkeys(TEXTS[:-2], 1.0)],
    "data.validation": [{}, {"news": ("a.txt", "b, c.txt")}],
    "mesh.rules": [{"vocab": ("tensor", "fsdp"), "embed": ()}],
    "model.mlp_output_bias": [None, True],
    "model.windows": [(), (8, 0)],
    "model.rope_bounds": [(), (1.0, 3e-05)],
}
PAIRS = [(path, value) for path, values in VALUES.items() for value in values]
# Their values are of sections with keys of their own; see below.
OF_RECORDS = ("data.mixture", "data.stages")


@pytest.mark.parametrize(("path", "value"), PAIRS, ids=str)
def test_a_value_is_read_again_as_it_was_spelled(path, value):
    text = spelled(value)
    assert "\n" not in text
    assert gather([], [f"{path}={text}"]) == {path: value}
    if not isinstance(value, str):  # YAML has other rules for a text that stands alone
        assert gather([("file", f"{path.replace('.', ': {', 1)}: {text}}}")], []) == {path: value}


def test_every_type_of_keys_is_spelled_above():
    types = {str(field.type) for path, field in FIELDS.items() if path not in OF_RECORDS}
    assert types == {str(FIELDS[path].type) for path in VALUES}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (("a", "b"), "[a, b]"),
        ({"a": (1, None)}, "{a: [1, null]}"),
        (3, "3"),
        ("a", "a"),
    ],
)
def test_an_error_spells_the_value(value, text):
    with pytest.raises(ConfigError) as caught:
        check(False, "section.key", value, "is wrong")
    assert str(caught.value) == f"section.key={text}: is wrong"


def test_of_a_mixture_its_entries_are_spelled():
    as_typed = ["data.mixture.a={files: ['a, b.txt']}", "data.mixture.b={source: stdlib, epochs: 2}"]
    config = parse(as_typed)
    text = spelled(config.data.mixture)
    assert text.startswith("{a: {files: ['a, b.txt'], weight: 1.0, ")
    assert parse([f"data.mixture={text}"]).data.mixture == config.data.mixture
    stages = parse([*as_typed, "data.stages=[{at: 5, weights: {a: 1}}]"]).data.stages
    assert spelled(stages) == "[{at: 5.0, weights: {a: 1.0}}]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.muon_except=[a, b]"], "optimizer.muon_except=[a, b]: only for optimizer.name=muon"),
        (["data.source=stdlib", "data.files=[a.txt]"], "data.files=[a.txt]: data.source=stdlib reads no files"),
        (["train.stall_exit=true"], "train.stall_exit=true: needs train.stall_seconds"),
        (["checkpoint.local_every=5"], "checkpoint.local_dir=null: goes with checkpoint.local_every"),
        (["optimizer.schedule=piecewise"], "optimizer.piecewise={}: optimizer.schedule=piecewise needs steps"),
        (
            ["train.sample_tokens=0", "train.sample_prompt='null'"],
            "train.sample_prompt='null': needs train.sample_tokens",
        ),
        (
            ["data.source=text", "data.files=[a.jsonl]", "data.filter=[language]"],
            "data.filter=[language]: a condition is FIELD OPERATOR VALUE",
        ),
    ],
)
def test_refusals_spell_values_as_they_are_typed(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert str(caught.value).startswith(message)


def test_differences_of_runs_spell_values_as_they_are_typed():
    saved = hn.RunConfig(optimizer=OptimizerSection(clip=None))
    factors = {"*/kernel": 0.5}
    asked = dataclasses.replace(saved, optimizer=OptimizerSection(rate_factors=factors, decay_embeddings=True))
    lines = differences(saved, asked)
    assert "optimizer.clip: saved null, asked 1.0" in lines
    assert "optimizer.decay_embeddings: saved false, asked true" in lines
    assert "optimizer.rate_factors: saved {}, asked {'*/kernel': 0.5}" in lines
