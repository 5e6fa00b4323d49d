"""data.mixture and data.stages: read from files and arguments, merged, written back, and refused in one line."""

import dataclasses

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_help import key_table
from hybridnorm_jax.config.resume_keys import resume_differences
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.errors import ConfigError

MIXED = """
data:
  mixture:
    web: {files: [web.jsonl], weight: 3}
    code: {files: [code.npy], epochs: 4}
  stages:
    - {at: 0.5, weights: {web: 1, code: 1}}
"""


@pytest.fixture
def mixed(tmp_path):
    """Makes a configuration of MIXED and overrides."""
    file = tmp_path / "mixed.yaml"
    file.write_text(MIXED)
    return lambda *overrides: parse([str(file), *overrides])


def test_a_file_and_arguments_say_together_what_a_source_is(mixed):
    config = mixed("data.mixture.web.weight=7", "data.mixture.lib={source: stdlib, weight: 2}", "train.steps=10")
    web, code, lib = config.data.mixture.values()
    assert (web.files, web.weight, web.source) == (("web.jsonl",), 7.0, "text")
    assert (code.weight, code.epochs, code.source) == (1.0, 4.0, "tokens")
    assert (lib.files, lib.source) == ((), "stdlib")
    first, second = config.data.mixture_stages(10)
    assert (first.step, first.weights) == (0, {"code": 0.1, "lib": 0.2, "web": 0.7})
    assert (second.step, second.weights) == (5, {"code": 0.5, "web": 0.5})
    assert from_yaml(to_yaml(config)) == config
    assert mixed("data.mixture.web.weight=7").run.name == "mixed-web.weight=7"


def test_each_source_has_a_data_section_of_its_own(mixed):
    config = mixed("data.separator_id=7", "data.filter=[a == b]", "data.mixture.web.text_field=body")
    web, code = config.data.sources.values()
    assert (web.source, web.files, web.text_field, web.separator_id) == ("text", ("web.jsonl",), "body", None)
    assert (code.source, code.files, code.filter, code.separator_id) == ("tokens", ("code.npy",), (), 7)
    plain = parse([]).data
    assert plain.sources == {"": plain}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.mixture.web.wieght=3", "data.mixture.web.wieght=3: no such key; did you mean 'weight'?"),
        ("data.mixture.web.weight=-1", "data.mixture.web.weight=-1: must be at least 0 and at most"),
        ("data.mixture.web.weight=.nan", "data.mixture.web.weight=.nan: must be at least 0"),
        ("data.mixture.web=3", "data.mixture.web=3: expected a map with the keys files, weight"),
        ("data.mixture=3", "data.mixture=3: expected a map, such as {name: {...}}"),
        ("data.mixture.x={}", "data.mixture.x.files=[]: needs at least one file, or source: stdlib"),
        ("data.mixture={books: {source: stdlib}, book: {weight: 2}}", "source: stdlib; did you mean 'books'?"),
        ("data.mixture.x={files: [a.foo]}", "data.mixture.x.files=[a.foo]: their names do not say"),
        ("data.mixture.x={files: [a.txt, b.npy]}", "their names do not say whether they hold text or tokens, or say"),
        ("data.mixture.x={source: std}", "data.mixture.x.source=std: not known; did you mean 'stdlib'?"),
        ("data.mixture.x={source: stdlib, files: [a]}", "source: stdlib reads no files"),
        ("data.mixture.train={files: [a.txt]}", "data.mixture.train: its held-out part"),
        ("data.mixture.validation={files: [a.txt]}", "data.mixture.validation: a set of that name is the mean"),
        ("data.mixture.é={files: [a.txt]}", "the name of a source has 1 to 60 letters, digits, - and _"),
        ("data.mixture_unit=rows", "data.mixture_unit=rows: not known; known: documents, tokens"),
        ("data.validation.web=[a.txt]", "data.validation.web=[a.txt]: the held-out part of the source has that name"),
        ("data.files=[a.txt]", "data.files=[a.txt]: with data.mixture each source names its own files"),
        (
            "data.stages=[{at: 0.5, weights: {wbe: 1}}]",
            "stage 1: wbe is no source of data.mixture; did you mean 'web'?",
        ),
        ("data.stages=[{at: 0.5, weights: {web: -1}}]", "item 1: weights: must be at least 0"),
        ("data.stages=[{at: 0.5, weights: {web: .nan}}]", "item 1: weights: must be at least 0"),
        ("data.stages=[{at: 0.5, weights: {web: 0}}]", "stage 1: weights: the weights (web: 0) sum to 0"),
        ("data.stages=[{at: 0.5}]", "stage 1: needs weights, such as {at: 0.9, weights: {web: 1}}"),
        ("data.stages=[{weights: {web: 1}}]", "stage 1: at=0: must be above 0"),
        ("data.stages=[{at: 5.5, weights: {web: 1}}]", "stage 1: at=5.5: a step must be a whole number"),
        (
            "data.stages=[{at: 1000, weights: {web: 1}}]",
            "at=1000: must be before the end of the run, train.steps=1,000",
        ),
        ("data.stages=[{at: 0.00001, weights: {web: 1}}]", "at=1e-05: is step 0, which must be after the beginning"),
        (
            "data.stages=[{at: 0.5, weights: {web: 1}}, {at: 400, weights: {web: 1}}]",
            "stage 2: at=400: must be after stage 1, which begins after step 500; order the stages",
        ),
    ],
)
def test_what_no_mixture_can_be_is_refused_in_one_line(mixed, override, says):
    with pytest.raises(ConfigError) as caught:
        mixed(override, "train.steps=1000")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_all_zero_are_refused(mixed):
    with pytest.raises(ConfigError, match=r"data\.mixture: the weights \(web: 0, code: 0\) sum to 0"):
        mixed("data.mixture.web.weight=0", "data.mixture.code.weight=0")


def test_a_mixture_and_none_differ_in_one_short_line(mixed):
    several = mixed()
    plain = dataclasses.replace(several, data=dataclasses.replace(several.data, mixture={}, stages=()))
    assert resume_differences(several, plain, 3) == ["data.mixture: saved web, code, asked none"]
    assert resume_differences(plain, several, 3) == ["data.mixture: saved none, asked web, code"]


def test_stages_need_a_mixture():
    with pytest.raises(ConfigError, match=r"^data\.stages=\[\{at: .*\}\]: needs data\.mixture"):
        parse(["data.stages=[{at: 0.5, weights: {web: 1}}]"])


def test_a_mistake_in_a_file_names_the_file_and_the_key(tmp_path):
    (tmp_path / "bad.yaml").write_text("data: {mixture: {web: {files: [a.txt], weight: much}}}")
    with pytest.raises(ConfigError, match=r"bad\.yaml: data\.mixture\.web\.weight=much: expected a number"):
        parse([str(tmp_path / "bad.yaml")])


def test_help_lists_the_keys_of_a_source():
    text = " ".join(key_table().split())
    assert "data.mixture.NAME.weight=1.0 (number) its share is its weight / the sum of all weights" in text


def test_what_may_change_while_a_run_goes_on(mixed):
    saved = mixed("train.steps=1000")
    assert resume_differences(saved, mixed("train.steps=1000", "data.mixture.web.files=[there/web.jsonl]"), 700) == []
    assert resume_differences(saved, mixed("train.steps=1000", "data.mixture.code.epochs=9"), 700) == []
    assert resume_differences(saved, mixed("train.steps=1000", "data.mixture.code.weight=2"), 700)
    other = "data.stages=[{at: 0.5, weights: {web: 1, code: 2}}]"
    assert resume_differences(saved, mixed("train.steps=1000", other), 500) == []
    assert resume_differences(saved, mixed("train.steps=1000", other), 501)
    # Three to one is six to two.
    twice = ("data.mixture.web.weight=6", "data.mixture.code.weight=2")
    assert resume_differences(saved, mixed("train.steps=1000", *twice), 700) == []
