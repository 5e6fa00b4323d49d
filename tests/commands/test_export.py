"""`hybridnorm export`: what it writes, and what it refuses in one line."""

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import others_are_long
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.yaml_files import from_yaml
from hybridnorm_jax.data.tokens.tokenizer_files import byte_tokenizer_json
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.generation.generate import generate
from hybridnorm_jax.interop.mathematics import mathematics
from hybridnorm_jax.interop.own_architecture import CODE_FILES
from hybridnorm_jax.training.trained_before import Trained

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 257}
ALWAYS = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TRAINED = {"training_config.yaml"}
CODE = set(CODE_FILES)
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path, monkeypatch):
    """In an empty directory; float64 is as it was before the command."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not jax.config.read("jax_enable_x64")


@pytest.fixture
def saved(random_params):
    """Saves a run in runs/NAME, and returns its configuration and parameters."""

    def save(name="mine", data=None, step=7, **model):
        config = hn.RunConfig(model=hn.ModelConfig(**(SIZES | {"scheme": "span"} | model)))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **(data or {})))
        params = random_params(config.model)
        hn.save_run(f"runs/{name}", config, params, step=step)
        return config, params

    return save


def exported(*arguments):
    assert main(["export", *arguments]) == 0
    return Path(arguments[1])


def names(directory):
    return {path.name for path in directory.iterdir()}


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def record(*lines):
    """What a run in runs/mine says of its training."""
    Path("runs/mine/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_written_whole(saved, capsys):
    config, params = saved()
    record({"step": 7, "train/loss": 3.25})
    out = exported("runs/mine", "out")
    assert names(out) == ALWAYS | TRAINED | CODE | TOKENIZER
    model, read = hn.load_huggingface(out)
    assert (model.scheme, model.dropout) == ("span", config.model.dropout)
    assert_same(read, params)
    document = json.loads((out / "config.json").read_text())
    assert document["max_position_embeddings"] == config.train.seq_len
    assert document["eos_token_id"] == 256
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 256
    assert from_yaml((out / "training_config.yaml").read_text(), origin="it").model == config.model
    said = capsys.readouterr().out
    assert said.startswith("out: hybridnorm, step 7 of runs/mine\n")
    assert "from_pretrained('out', trust_remote_code=True)" in said
    assert {os.stat(path).st_mode & 0o777 for path in out.iterdir()} == {
        os.stat("runs/mine/config.yaml").st_mode & 0o777
    }


def test_what_transformers_has_needs_no_code(saved, capsys):
    saved(scheme="pre", positions="rope")
    out = exported("runs/mine", "out", "--dtype", "bfloat16")
    assert names(out) == ALWAYS | TOKENIZER
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert hn.load_huggingface(out)[0].param_dtype == "bfloat16"
    assert "trust_remote_code" not in capsys.readouterr().out
    assert "`LlamaForCausalLM` of transformers" in (out / "README.md").read_text()


# Two numbers; two matrices. The others take as long.
KINDS = others_are_long([name for name, kind in hn.NORM_KINDS.items() if kind.parameters], ["derf", "gated"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_norm_with_parameters_of_its_own_is_written_and_read(saved, kind):
    config, params = saved(scheme="pre", norm=kind, learned_embedding_scale=True)
    out = exported("runs/mine", "out")
    document = json.loads((out / "config.json").read_text())
    assert (document["norm"], document["learned_embedding_scale"]) == (kind, True)
    model, read = hn.load_huggingface(out)
    assert mathematics(model) == mathematics(config.model)
    assert_same(read, params)
    names = load_file(out / "model.safetensors").keys()
    own = {f"model.layers.1.attention_pre_norm.{name}" for name in hn.NORM_KINDS[kind].parameter_names}
    assert own | {"model.embedding_scale.weight"} <= names


def test_plain_safetensors_are_our_tree(saved):
    config, params = saved(num_experts=3, experts_per_token=2)
    out = exported("runs/mine", "out", "--format", "safetensors")
    assert names(out) == (ALWAYS | TOKENIZER | {"model_config.json"}) - {"config.json", "generation_config.json"}
    assert hn.ModelConfig(**json.loads((out / "model_config.json").read_text())) == config.model
    assert_same(unflatten_dict(load_file(out / "model.safetensors"), sep="/"), params)
    assert "hn.Decoder(config)" in (out / "README.md").read_text()


def test_a_checkpoint_that_is_named_is_the_one(saved):
    saved(step=7)
    assert "step 7" in (exported("runs/mine@7", "out") / "README.md").read_text()
    exported("runs/mine/checkpoints/000007", "again")
    assert main(["export", "runs/mine@8", "other"]) == 2


def test_float64_stays_float64(saved):
    with jax.enable_x64(True):
        _, params = saved(param_dtype="float64", dtype="float64")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float64")}
    assert_same(hn.load_huggingface(exported("runs/mine", "out"))[1], params)


def test_the_card_says_scheme_data_loss_command_and_license(saved):
    config, _ = saved()
    record({"step": 5, "train/loss": 3.25}, {"step": 7, "eval/validation/loss": 2.5}, {"step": 9, "train/loss": 1.0})
    card = (exported("runs/mine", "out", "--license", "apache-2.0") / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert hn.describe("span", 2) in card
    assert "the source files of Python's standard library" in card
    assert "`eval/validation/loss` at step 7: 2.5000 nats" in card
    assert "`train/loss` at step 5: 3.2500 nats" in card
    tokens = 7 * config.train.batch_size * config.train.seq_len
    assert f"{tokens:,} tokens" in card
    assert "hybridnorm train training_config.yaml" in card


def test_the_cards_own_example_writes_the_text_that_we_write(saved, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0").logging.set_verbosity_error()
    config, params = saved()
    card = (exported("runs/mine", "out") / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    jax.config.update("jax_enable_x64", False)
    capsys.readouterr()
    exec(compile(example.replace("max_new_tokens=100", "max_new_tokens=20"), "README.md", "exec"), {"DIRECTORY": "out"})
    prompt = [256, *b"def "]
    (written,) = generate(config.model, params, [prompt], max_new_tokens=20, stop_ids=[256])
    text = "<|endoftext|>" + ByteTokenizer().decode([*prompt[1:], *written])
    assert capsys.readouterr().out == text + "\n"


def test_a_scheme_of_a_plugin_is_exported_where_the_plugin_is_named(saved, capsys):
    Path("mine.py").write_text(
        "import hybridnorm_jax as hn\n\n\n@hn.scheme('in_a_file')\ndef in_a_file(layer, num_layers):\n"
        "    return hn.BlockPlacement(hn.SublayerPlacement(post=True, branch_scale=0.5), hn.SublayerPlacement())\n"
    )
    from hybridnorm_jax.config.plugins import import_plugins

    import_plugins(["mine.py"])
    _, params = saved(scheme="in_a_file")
    out = exported("runs/mine", "out", "run.plugins=[mine.py]")
    placement = {"attention": {"post": True, "branch_scale": 0.5}, "feed_forward": {}}
    assert json.loads((out / "config.json").read_text())["placements"] == [placement] * 2
    assert_same(hn.load_huggingface(out)[1], params)
    capsys.readouterr()
    del hn.SCHEMES["in_a_file"]
    assert main(["export", "runs/mine", "other"]) == 2
    assert "in_a_file" in capsys.readouterr().err


@pytest.mark.long  # test_huggingface_beginning.py begins with an export
def test_a_run_trains_on_from_an_export_and_no_other_scheme_is_suggested_for_it(saved, capsys):
    """The parameters of another scheme are those of another model."""
    saved()
    exported("runs/mine", "out")
    capsys.readouterr()
    model = [f"model.{key}={value}" for key, value in SIZES.items()]
    train = ["train.steps=1", "train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0", "eval.batches=1"]
    Path("text.txt").write_text("alpha beta gamma delta\n\n" * 200)
    data = ["data.source=text", "data.files=[text.txt]", "data.cache_dir=cache", "run.name=heir"]
    assert main(["train", "init_from=out", "model.scheme=span", *model, *train, *data]) == 0
    told = capsys.readouterr().out.partition("Next:")[2]
    assert "eval runs/heir" in told
    assert "model.scheme=" not in told
    Path("runs/heir/metrics.jsonl").unlink()  # its checkpoint knows as well that the run trained it
    heir = exported("runs/heir", "heir")
    assert names(heir) == ALWAYS | TRAINED | CODE | TOKENIZER
    assert "The run is repeated with" in (heir / "README.md").read_text()


def test_a_converted_run_does_not_claim_to_be_trained_in_its_new_form(saved, capsys):
    """Its data are known, but the configuration of the new form would train another model."""
    saved(scheme="pre", norm="layernorm")
    trained = Trained(source="stdlib", validation_fraction=0.01, files=[])
    config, params = hn.load_run("runs/mine")
    hn.save_run("runs/known", config, params, step=7, trained_on=[trained])
    assert main(["convert", "runs/known", "runs/converted", "--form", "pre_rmsnorm"]) == 0
    out = exported("runs/converted", "out")
    assert names(out) == ALWAYS | CODE | TOKENIZER
    card = (out / "README.md").read_text()
    assert "trained with hybridnorm_jax" in card
    assert "the source files of Python's standard library" in card
    assert "hybridnorm train" not in card
    assert "training_config.yaml" not in card


def _token_file(name="mine.json", **changes):
    Path(name).write_text(json.dumps(byte_tokenizer_json() | changes))
    return name


def test_a_tokenizer_of_a_file_is_copied_and_may_have_moved(saved):
    data = {"tokenizer": str(Path(_token_file()).absolute())}
    saved(data=data)
    out = exported("runs/mine", "out")
    assert (out / "tokenizer.json").read_bytes() == Path("mine.json").read_bytes()
    Path("mine.json").rename("moved.json")
    assert (exported("runs/mine", "again", "--tokenizer", "moved.json") / "tokenizer.json").exists()


def test_token_files_without_a_tokenizer_bring_none(saved):
    saved(data={"source": "tokens", "files": ("a.npy",), "separator_id": 5, "validation_fraction": 0.1})
    out = exported("runs/mine", "out")
    assert names(out) == ALWAYS | CODE
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 5
    assert "It came without a tokenizer" in (out / "README.md").read_text()


def test_a_converted_checkpoint_gets_no_tokenizer_and_no_data_that_it_never_saw(tmp_path, random_params, capsys):
    """It once got the tokenizer of bytes, and a card that said it was trained on Python's standard library."""
    config = hn.ModelConfig(**SIZES, scheme="parallel", norm="layernorm", norm_bias=True, mlp_bias=True)
    hn.save_huggingface("hf", config, random_params(config), architecture="hybridnorm")
    assert main(["convert", "hf", "runs/converted", "--form", "pre_rmsnorm"]) == 0
    out = exported("runs/converted", "out")
    assert names(out) == ALWAYS | CODE
    card = (out / "README.md").read_text()
    assert "written by hybridnorm_jax" in card
    assert "has no record of its training" in card
    assert "standard library" not in card
    assert "hybridnorm train" not in card
    # It was 256, the length of a sequence of training by default, to which others would have cut its texts.
    assert "max_position_embeddings" not in json.loads((out / "config.json").read_text())
    capsys.readouterr()
    for words in (["generate", "runs/converted", "--prompt", "a"], ["eval", "runs/converted"]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "tokenizer" in line
    # Whoever knows its tokenizer names it.
    assert names(exported("runs/converted", "named", "--tokenizer", "bytes")) == ALWAYS | CODE | TOKENIZER


def _missing_tokenizer(saved):
    saved(data={"tokenizer": "/nowhere/tokenizer.json"})


def _small_vocabulary(saved):
    saved(vocab_size=200)


def _full_directory(saved):
    saved()
    Path("out").mkdir()
    Path("out/notes").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["runs/mine"], "hybridnorm export: the following arguments are required: OUT_DIR"),
        (None, ["nowhere", "out"], "nowhere"),
        (None, ["https://a/b", "out"], "https://a/b: must be a directory of this machine, or begin with gs://"),
        (None, ["", "out"], "'': an empty name; name a directory"),
        (None, ["nowhere", ""], "'': an empty name; name a directory"),
        (lambda saved: Path("empty").mkdir(), ["empty", "out"], "no complete checkpoint there"),
        (None, ["runs/mine", "out", "--format", "gguf"], "hybridnorm export: argument --format: invalid choice"),
        (None, ["runs/mine", "out", "--form", "x"], "--form: an option of `hybridnorm convert`, not of `hybridnorm ex"),
        (None, ["runs/mine", "out", "train.steps=3"], "train.steps=3: a key of `hybridnorm train`"),
        (None, ["runs/mine", "out", "--license", "a: b"], "--license 'a: b': must be an identifier"),
        (lambda saved: saved(), ["runs/mine", "runs/mine/out"], "runs/mine/out: lies in runs/mine, which is only read"),
        (lambda saved: saved(), ["runs/mine", "out", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (lambda saved: saved(), ["runs/mine", "out", "--tokenizer", "none.json"], "--tokenizer none.json"),
        (_full_directory, ["runs/mine", "out"], "out: exists already; name a new directory"),
        (_missing_tokenizer, ["runs/mine", "out"], "data.tokenizer=/nowhere/tokenizer.json"),
        (_small_vocabulary, ["runs/mine", "out"], "data.tokenizer=bytes: has 257 tokens, but the model knows 200"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(saved, capsys, prepare, arguments, message):
    if prepare is not None:
        prepare(saved)
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before
