"""Every key of numbers has a finite range, which is checked where it is set and where a section is made."""

import dataclasses
import math
import typing

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.key_help import key_table
from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS, default
from hybridnorm_jax.config.key_values import read_hint
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.config.yaml_files import from_yaml, gather, to_yaml
from hybridnorm_jax.config_fields import Range
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.compare_options import CompareOptions
from hybridnorm_jax.lab.signal_at_start import SignalOptions
from hybridnorm_jax.lab.width_check import WidthOptions
from hybridnorm_jax.model.config import ModelConfig

OPTIONS = {
    field.name: field for kind in (CompareOptions, SignalOptions, WidthOptions) for field in dataclasses.fields(kind)
}


def is_number(field):
    kind = read_hint(field.type).kind
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    return inner in (int, float)


NUMBERS = {path: field for path, field in (FIELDS | OPTIONS).items() if is_number(field)}


def error_of(function, *arguments, **keys):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keys)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_every_number_has_a_finite_range_that_holds_its_default():
    assert len(NUMBERS) > 60
    for path, field in NUMBERS.items():
        limits = field.metadata["range"]
        assert isinstance(limits, Range), f"{path} has no range"
        assert not limits.holds(math.inf), f"{path}: {limits}"
        assert not limits.holds(-math.inf), f"{path}: {limits}"
        values = default(field)
        for value in values if isinstance(values, tuple) else (values,):
            assert value is None or limits.holds(value), path


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "1" + "0" * 400, "-" + "9" * 5000, str(2**70)])
def test_what_no_run_can_mean_is_refused_with_the_key_and_its_range(value):
    for path in NUMBERS.keys() & FIELDS.keys():
        given = f"[{value}]" if isinstance(FIELDS[path].default, tuple) else value
        message = error_of(gather, [], [f"{path}={given}"])
        assert message.startswith(f"{path}={given[:60]}")
        assert message.endswith(f"must be {FIELDS[path].metadata['range']}")
        assert len(message) < 400


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_made_in_python_is_checked_too(section):
    for field in dataclasses.fields(SECTIONS[section]):
        if is_number(field):
            for value in (float("nan"), float("inf"), 10**400, "3"):
                message = error_of(SECTIONS[section], **{field.name: value})
                assert message.startswith(f"{section}.{field.name}=")


def test_the_limits_leave_room_for_the_largest_models_trained():
    """10^12 parameters on batches of 60 million tokens; a context of 10 million; 1,000 layers; 256 experts."""
    model = {"num_layers": 128, "d_model": 25600, "num_heads": 200, "mlp_dim": 102400, "vocab_size": 262144}
    assert ModelConfig(**model).vocab_size == 262144
    assert ModelConfig(d_model=7168, num_heads=128, num_experts=384, experts_per_token=8, mlp_dim=2048, num_layers=61)
    assert ModelConfig(num_layers=1000).num_layers == 1000
    assert RunConfig(train=TrainSection(batch_size=16384, seq_len=4096, steps=10**8)).tokens_per_step == 2**26
    assert TrainSection(seq_len=10_485_760, batch_size=1).seq_len == 10_485_760


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (
            "model.d_model=1000000 model.num_heads=8 model.mlp_dim=16000000 model.num_layers=10000",
            ("model.d_model", "parameters"),
        ),
        ("train.batch_size=1000000 train.seq_len=16000000", ("train.batch_size", "train.seq_len", "tokens")),
        ("eval.batch_size=1000000 train.seq_len=16000000 train.batch_size=1", ("eval.batch_size", "tokens")),
        ("data.separator_id=257 data.source=tokens data.files=[a.npy]", ("data.separator_id", "model.vocab_size")),
        ("mesh.fsdp=0", ("mesh.fsdp", "-1")),
        # More steps of warm-up than a step's counter can hold.
        (f"optimizer.warmup_tokens={10**18} optimizer.warmup_steps=0", ("warmup_tokens", "1,000,000,000 steps of")),
    ],
)
def test_values_that_are_absurd_together_are_refused(keys, names):
    message = error_of(parse, keys.split())
    for name in names:
        assert name in message


def test_a_file_is_named_with_the_value_that_is_out_of_range(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("train:\n  steps: 0\n")
    assert error_of(parse, [str(file)]) == f"{file}: train.steps=0: must be at least 1 and at most 1,000,000,000"


def test_help_shows_the_ranges():
    text = " ".join(key_table().split())
    assert "optimizer steps in all [at least 1 and at most" in text
    assert "decay of the first moment [at least 0 and below 1]" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("+0.5", 0.5),
        ("1", 1.0),
        ("0", None),
        ("1_000", 1000.0),
        ("0.1e+1", 1.0),
        ("abc", None),
        ("'0.1'", None),
        ("010", None),
        ("0x10", None),
        ("1:30", None),
        ("1_0", None),
        ("2024-01-01", None),
        ("1,5", None),
        ("true", None),
        ("٣", None),
    ],
)
def test_numbers_have_one_spelling(text, value):
    if value is None:
        assert "optimizer.learning_rate" in error_of(parse, [f"optimizer.learning_rate={text}"])
    else:
        assert parse([f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("010", "without leading zeros"),
        ("0x10", "in decimal"),
        ("'20'", "without quotes"),
        ("1e3", "written in digits"),
    ],
)
def test_an_integer_in_another_spelling_is_refused_with_the_right_one(text, hint):
    assert hint in error_of(parse, [f"train.steps={text}"])


def test_an_integer_may_be_grouped():
    assert parse(["train.steps=1_000_000"]).train.steps == 1_000_000
    assert "train.steps=1_00" in error_of(parse, ["train.steps=1_00"])


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "1", "'true'"])
def test_only_true_and_false_are_bools(word):
    assert "expected true or false" in error_of(parse, [f"data.segment_ids={word}"])


@pytest.mark.parametrize(
    "text", ["no", "007", "1:30", "2024-01-01", "1e3", "0x10", "=", "True", "a: b", "a #b", "[a]", "null "]
)
def test_a_text_is_what_is_typed(text, tmp_path):
    if text == "null ":
        assert "run.project" in error_of(parse, [f"run.project={text}"])
        return
    config = parse([f"run.project={text}"])
    assert config.run.project == text
    assert from_yaml(to_yaml(config)) == config


def test_a_text_in_a_file_needs_no_quotes_to_stay_a_text():
    assert from_yaml("run: {wandb_project: no}").run.project == "no"
    assert from_yaml("run: {wandb_project: 007}").run.project == "007"
    assert from_yaml("run: {wandb_project: 'null'}").run.project == "null"
    assert "expected text" in error_of(from_yaml, "run: {wandb_project: ~}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: &a {steps: 3}", "line 1: anchors and aliases"),
        ("train:\n  steps: *a", "line 2: anchors and aliases"),
        ("train:\n  <<: {steps: 3}", "line 2: merges (<<)"),
        ("train: {steps: !!int 3}", "tags (tag:yaml.org,2002:int) are not read"),
        ("run: {name: !!python/name:os.system }", "line 1: tags"),
        ("train: {steps: 3}\n---\ntrain: {}", "line 2: holds a second YAML document"),
        ("train: " + "[" * 50 + "]" * 50, "nested more than 20 deep"),
        ("train: {? [a] : 1}", "a key must be a text"),
        ("train: {steps: 3, steps: 4}", "duplicate key steps"),
        ("x" * 2_000_000, "at most 1,000,000"),
    ],
)
def test_yaml_that_a_configuration_does_not_need_is_refused(text, reason):
    assert reason in error_of(from_yaml, text)


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbftrain: {steps: 7}\n")
    assert parse([str(file)]).train.steps == 7


@pytest.mark.parametrize("text", ['"a\\0b"', '"a\\x1b[31m"', "x" * 5000])
def test_texts_are_short_and_without_control_characters(text):
    message = error_of(parse, [f"data.tokenizer={text}"])
    assert "must" in message
    assert len(message) < 400


def test_an_end_of_line_and_a_tab_may_be_in_a_text():
    assert parse(['data.separator="\\n\\t"']).data.separator == "\n\t"
