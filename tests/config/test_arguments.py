"""Files and overrides become the configuration they ask for, or one line that says what is wrong."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnorm_jax.config.arguments import is_override, parse
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.key_help import key_table
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.run_config import OptimizerSection, RunConfig, RunSection
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.schemes import SCHEMES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def error_of(function, *arguments):
    """The ConfigError's message, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_asked_is_the_quickstart():
    assert parse([]) == parse([str(CONFIGS / "quickstart.yaml")])
    assert parse([]).run.name == "quickstart"


def test_overrides_win_over_files_and_later_over_earlier(write):
    first = write("first.yaml", "train: {steps: 10, seed: 1, batch_size: 8}\ndata: {validation: {a: [a.txt]}}")
    second = write("second.yaml", "train:\n  steps: 20\n  seed: 2\nmodel:\ndata:\n  validation:\n    b: [b.txt]\n")
    words = ["train.seed=3", first, "train.seed=4", second, "data.validation.c=[c.txt]"]
    config = parse(words)
    assert (config.train.batch_size, config.train.steps, config.train.seed) == (8, 20, 4)
    assert config.data.validation == {"a": ("a.txt",), "b": ("b.txt",), "c": ("c.txt",)}
    assert config.model == ModelConfig()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.clip=null", None),
        ("data.segment_ids=true", True),
        ("data.separator=", ""),
        ("data.separator=<|endoftext|>", "<|endoftext|>"),
        ("data.separator=007", "007"),
        ("run.plugins=[math, json]", ("math", "json")),
        ("run.name=a=b", "a=b"),
        ("model.embedding_norm=true", "true"),
        ("model.num_kv_heads=3", 3),
        ("init_from=runs/x=1/config.yaml", "runs/x=1/config.yaml"),
    ],
)
def test_values_take_the_type_of_their_key(override, value):
    section, _, name = override.partition("=")[0].rpartition(".")
    config = parse([override])
    found = getattr(getattr(config, section) if section else config, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "is_key"),
    [
        ("train.steps=3", True),
        ("init_from=runs/trunk/config.yaml", True),
        ("data.files=[a/b.yaml]", True),
        ("no-key=3", True),  # refused later, as a key that there is not
        ("runs/lab-steps=100/config.yaml", False),
        ("lab-steps=100.yml", False),
        ("=.yaml", False),
        ("quickstart", False),
        ("book.txt", False),
    ],
)
def test_overrides_and_files_are_told_apart(argument, is_key):
    assert is_override(argument) == is_key


def test_embedding_norm_may_be_a_boolean_in_yaml(write):
    assert parse([write("a.yaml", "model: {embedding_norm: true}")]).model.embedding_norm == "true"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=abc", "train.steps=abc: expected an integer"),
        ("train.steps=1.5", "train.steps=1.5: expected an integer"),
        ("train.steps=true", "train.steps=true: expected an integer"),
        ("train.steps=null", "train.steps=null: expected an integer"),
        ("train.steps.more=1", "train.steps.more=1: expected an integer"),
        ("optimizer.clip=x", "optimizer.clip=x: expected a number or null"),
        ("train.profile=1", "train.profile=1: expected true or false"),
        ("data.files=a.txt", "data.files=a.txt: expected a list, such as [a, b]"),
        ("data.validation.c4=a.npy", "data.validation.c4=a.npy: expected a list, such as [a, b]"),
        ("run.name=null", "run.name=null: expected text"),
        ("train=3", "train=3: train is a section, not a key; --help lists its keys"),
        ("train.step=3", "train.step=3: no such key; did you mean 'train.steps'?"),
        ("trian.steps=3", "trian.steps=3: no such key; did you mean 'train.steps'?"),
        ("model.seq_len=3", "model.seq_len=3: no such key; did you mean 'train.seq_len'?"),
        ("--steps=3", "--steps=3: no such key; did you mean 'train.steps'?"),
        ("nonsense={}", "nonsense={}: no such key; --help lists every key"),
        ('data.validation={"a\\nb": [a.txt]}', r'data.validation=["a\nb"]: a validation set needs a name in printable'),
        ("data.files=[a", "data.files=[a: not valid YAML"),
        (
            "data.files=[ä, @l]",
            "data.files=[ä, @l]: not valid YAML: found character that cannot start any token; "
            'a value that begins with @ needs quotes, such as "@list.txt"',
        ),
        ("data.cache_dir=${oc.env:HOME}", "data.cache_dir=${oc.env:HOME}: interpolation"),
        ("data.cache_dir=${oc", "data.cache_dir=${oc: interpolation"),
        ("no_such_file", "no_such_file: no such configuration"),
        ("no_such_file.yaml", "no_such_file.yaml: cannot be read: No such file or directory"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("model.num_heads=5", "model.num_heads=5: must divide model.d_model=192"),
        ("model.scheme=hybird", "model.scheme=hybird: not known; did you mean 'hybrid'?"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(override, message):
    assert error_of(parse, [override]).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {step: 3}", "{}: train.step=3: no such key; did you mean 'train.steps'?"),
        ("train: {steps: abc}", "{}: train.steps=abc: expected an integer"),
        ("model: {scheme: 3}", "model.scheme=3: not known"),
        ("train:\n  steps: 3\n  steps: 4\n", "{}, line 3: not valid YAML: found duplicate key steps"),
        ("train: 1\n- a", "{}, line 2: not valid YAML"),
        ("- train", "{}: must hold keys and values"),
        ("7", "{}: must hold keys and values"),
        ("data: {cache_dir: '${oc.env:HOME}'}", "{}: data.cache_dir=${oc.env:HOME}: interpolation"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(write, text, message):
    file = write("bad.yaml", text)
    assert error_of(parse, [file]).startswith(message.replace("{}", file))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml: cannot be read: not UTF-8" in error_of(parse, [str(tmp_path / "bad.yaml")])
    (tmp_path / "bad.yaml").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    right = f"a pointer of git-lfs, not the file itself; run `git lfs pull` in {tmp_path}"
    assert f"bad.yaml: {right}" in error_of(parse, [str(tmp_path / "bad.yaml")])


def test_the_name_of_a_run_follows_from_the_command():
    def name(*words):
        return parse(words).run.name

    assert name("model.scheme=span", "train.steps=20") == "quickstart-scheme=span-steps=20"
    assert name("train.steps=9", "run.dir=/tmp/x", "train.steps=20", "model.scheme=span") == name(
        "model.scheme=span", "train.steps=20"
    )
    # A set that is only evaluated decides nothing of what is trained.
    assert name("data.validation.c4=[a/b.txt]") == "quickstart"
    assert name("data.source=text", "data.files=[a/b.txt]").startswith("quickstart-")
    assert name("run.name=mine", "train.steps=20") == "mine"
    assert name("eval.every=10") == name("checkpoint.every=10") == "quickstart"
    long = [f"data.files=[{'x' * 200}{end}.txt]" for end in "ab"]
    assert len({name(word) for word in long}) == 2
    assert {len(name(word)) for word in long} == {120}


def test_the_path_of_a_saved_configuration_is_a_file_although_it_holds_an_equals_sign(tmp_path):
    config = parse(["train.steps=20"])
    saved = tmp_path / config.run.name / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(to_yaml(config))
    assert parse([str(saved)]) == config


def test_a_plugins_scheme_can_be_named_and_importing_it_again_changes_nothing(write):
    text = "import hybridnorm_jax.model.schemes as p\np.scheme('from_a_plugin')(p.SCHEMES['pre'].block)\n"
    file = write("my_schemes.py", text)
    words = [f"run.plugins=[{file}]", "model.scheme=from_a_plugin"]
    try:
        config = parse(words)
        assert config.model.scheme_rule.block is SCHEMES["pre"].block
        assert parse(words) == config == from_yaml(to_yaml(config))
    finally:
        SCHEMES.pop("from_a_plugin", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError"), (None, "FileNotFoundError")],
)
def test_a_plugin_that_cannot_be_imported_is_named_each_time(write, tmp_path, text, reason):
    file = str(tmp_path / "broken.py") if text is None else write("broken.py", text)
    for _ in range(2):
        message = error_of(parse, [f"run.plugins=[{file}]"])
        assert message.startswith(f"run.plugins: {file} cannot be imported: {reason}")
    assert "no_such_module_here" in error_of(parse, ["run.plugins=[no_such_module_here]"])


# `${` is refused; control characters and line separators are YAML line breaks to some of its writers.
printable = st.characters(codec="utf-8", exclude_characters="$", exclude_categories=["Cc", "Cs", "Zl", "Zp"])
texts = st.text(printable, max_size=8) | st.sampled_from(
    [
        "null",
        "~",
        "true",
        "on",
        "1e3",
        "1e-3",
        "007",
        "0x10",
        "1_000",
        "2024-01-01",
        "12:30:00",
        ".inf",
        "???",
        "=",
        "<<",
    ]
)
rates = st.floats(min_value=1e-30, max_value=1000)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    separator=texts,
    name=texts.filter(lambda text: text.strip() and text.isprintable()),
    files=st.lists(texts, max_size=2),
    rate=rates,
    eps=st.floats(min_value=1e-30, max_value=1),
    init_from=st.none() | texts,
)
def test_saved_and_read_again_is_equal(separator, name, files, rate, eps, init_from):
    config = RunConfig(
        run=RunSection(name="x"),
        data=DataSection(separator=separator, validation={name: tuple(files)}),
        optimizer=OptimizerSection(learning_rate=rate, eps=eps),
        init_from=init_from,
    )
    assert from_yaml(to_yaml(config)) == config


def test_a_saved_configuration_takes_overrides():
    config = parse(["model.scheme=peri"])
    assert from_yaml(to_yaml(config), ["eval.batches=3"]) == dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, batches=3)
    )


def test_differences_name_what_decides_the_trajectory():
    saved = parse([])
    assert differences(saved, saved) == []
    assert differences(parse(["model.scheme=hybrid"]), parse(["model.scheme=span", "train.seed=1"])) == [
        "model.scheme: saved hybrid, asked span",
        "train.seed: saved 0, asked 1",
    ]
    free = "run.dir=x mesh.fsdp=2 checkpoint.every=7 eval.batches=1 train.log_every=1 train.profile=true "
    free += "train.sample_tokens=1 model.attention=xla model.remat=full model.scan_unroll=2 data.cache_dir=x "
    free += "data.read_threads=1 data.validation.c4=[a]"
    assert differences(saved, parse(free.split())) == []


def test_help_shows_every_key_with_its_default_or_the_value_of_the_files():
    plain, of_151m = key_table(), key_table(["151m", "train.seed=5"])
    assert max(map(len, [*plain.splitlines(), *of_151m.splitlines()])) <= 80

    def row(text, setting):
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [setting])
        return line.split()[1].strip("()")

    assert set(FIELDS) <= {line.split()[0].partition("=")[0] for line in plain.splitlines() if line}
    assert row(plain, "key=default") == row(of_151m, "key=value") == "type"
    assert row(plain, "train.steps=1000") == "integer"
    assert row(of_151m, "model.vocab_size=100352") == "integer"
    assert row(of_151m, "train.seed=5") == "integer"
    assert row(plain, "model.head_dim=null") == "integer|null"
    assert "distributed: The processes of a run on several hosts" in plain
    assert "train.sed" in error_of(key_table, ["train.sed=5"])


def test_a_name_that_is_also_a_file_here_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["151m", "data.files=[a.npy]"]).model.vocab_size == 100352
    (tmp_path / "151m").write_text("train: {steps: 3}")
    assert error_of(parse, ["151m"]).startswith("151m: a file here, and the name of a configuration; write ./151m")
    assert parse(["./151m"]).train.steps == 3
    # A directory of the name is no configuration that could be meant.
    (tmp_path / "lab").mkdir()
    assert parse(["lab"]).train.steps == parse([str(CONFIGS / "lab.yaml")]).train.steps


def test_a_path_that_leads_nowhere_names_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/quickstart.yaml", "quickstart.yaml"):
        message = error_of(parse, [path])
        assert message.startswith(f"{path}: no such file; the configuration that comes with the package is named")
        assert "`quickstart`" in message
    (tmp_path / "quickstart.yaml").write_text("train: {steps: 3}")
    assert parse(["quickstart.yaml"]).train.steps == 3


def parameters(model):
    """Of a bias-free SwiGLU decoder, norms left out (they are below 0.1 %)."""
    attention = 2 * model.d_model * model.head_dim * (model.num_heads + model.num_kv_heads)
    block = attention + 3 * model.d_model * model.mlp_dim
    return model.num_layers * block + model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)


@pytest.mark.parametrize(
    ("name", "millions", "tokens"),
    [
        ("151m", 151, 400e9),
        ("285m", 285, 400e9),
        ("550m", 550, 400e9),
        ("543m_deep", 543, 400e9),
        ("1b2", 1180, 1e12),
        ("7b", 6900, 150e9),
    ],
)
def test_a_paper_configuration_is_the_paper_model_and_recipe(name, millions, tokens):
    file = str(CONFIGS / f"{name}.yaml")
    assert "data.files" in error_of(parse, [file])
    config = parse([file, "data.files=[a.npy]"])
    assert parameters(config.model) / 1e6 == pytest.approx(millions, rel=0.005)
    # Within one step.
    assert config.train.steps * config.tokens_per_step == pytest.approx(tokens, abs=config.tokens_per_step)
    assert (config.train.batch_size, config.train.seq_len) == (1024, 4096)
    assert config.model.rope_theta == 5e5
    warmup_steps = 2000
    assert config.optimizer == OptimizerSection(
        learning_rate=3e-4, final_ratio=0.1, warmup_tokens=warmup_steps * config.tokens_per_step
    )
    for scheme in ("pre", "post", "span"):
        assert parse([file, "data.files=[a.npy]", f"model.scheme={scheme}"]).model.scheme == scheme


@pytest.mark.parametrize(
    ("arguments", "source", "files"),
    [
        (["book.txt"], "text", ("book.txt",)),
        (["a b.TXT", "quickstart", "c.jsonl.gz"], "text", ("a b.TXT", "c.jsonl.gz")),
        (["ids.npy"], "tokens", ("ids.npy",)),
        (["data.files=[one.txt]"], "text", ("one.txt",)),
        (["data.files=[shards/*.bin]"], "tokens", ("shards/*.bin",)),
        (["data.files=[odd.npy]", "data.source=text"], "text", ("odd.npy",)),
    ],
)
def test_data_files_are_known_by_their_names(arguments, source, files):
    config = parse(arguments)
    assert (config.data.source, config.data.files) == (source, files)
    assert config.model.vocab_size == 257


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["a.txt", "data.files=[b.txt]"], "name all of them in one place"),
        (["a.txt", "b.npy"], "a run reads one kind"),
        (["data.files=[nameless]"], "data.source=stdlib reads no files"),
    ],
)
def test_data_files_that_contradict_each_other_are_refused(arguments, right):
    with pytest.raises(ConfigError, match=right):
        parse(arguments)
