"""`hybridnorm generate`: text from a trained model, and one line for what cannot be."""

import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import hybridnorm_jax as hn
from hybridnorm_jax.commands import saved_model
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import load_tokenizer
from hybridnorm_jax.generation import text
from hybridnorm_jax.generation.text import write_text

GPT2 = str(Path(__file__).parents[1] / "goldens" / "hf_gpt2")
TINY = [
    *("model.scheme=pre", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"),
    *("train.batch_size=8", "train.seq_len=16", "train.steps=2", "train.sample_tokens=0", "eval.batches=1"),
    "data.source=text",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of bytes: one with rotary positions, one with 20 learned ones."""
    directory = tmp_path_factory.mktemp("generate")
    (directory / "a.txt").write_text("abc def\n" * 400)
    keys = [f"data.files=[{directory}/a.txt]", f"run.dir={directory}", f"data.cache_dir={directory}/cache"]
    assert main(["train", *TINY, *keys, "run.name=rope"]) == 0
    learned = ("model.positions=learned", "model.max_positions=20")
    assert main(["train", *TINY, *keys, *learned, "run.name=learned"]) == 0
    return directory


class Terminal(io.StringIO):
    """Where somebody types."""

    def isatty(self):
        return True


@pytest.fixture
def generate(runs, monkeypatch, capsys):
    """Runs the command; returns what it printed, or its one line of an error."""
    monkeypatch.chdir(runs)

    def command(*arguments, typed=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO("" if typed is None else typed))
        capsys.readouterr()
        status = main(["generate", *arguments])
        out, told = capsys.readouterr()
        if status == 0:
            return out
        (line,) = told.splitlines()
        return line

    return command


def test_the_text_is_that_of_the_library_from_every_kind_of_prompt(generate, runs):
    source = saved_model.read_directory("rope")
    tokenizer = load_tokenizer(source.config.data)
    (written,) = write_text(source.config.model, source.params, tokenizer, ["abc"], max_new_tokens=12)
    tokens = np.array([256, *b"abc"])
    (ids,) = hn.generate(source.config.model, source.params, [tokens], max_new_tokens=12, stop_ids=[256])
    assert written.text == tokenizer.decode(ids)
    (runs / "prompt.txt").write_text("abc")
    options = ("--max-tokens", "12")
    assert generate("rope", "--prompt", "abc", *options) == written.text + "\n"
    assert generate("rope", "--file", "prompt.txt", *options) == written.text + "\n"
    assert generate("rope", *options, typed="abc") == written.text + "\n"
    assert generate("rope@2", "--prompt", "abc", *options) == written.text + "\n"
    line = json.loads(generate("rope", "--prompt", "abc", *options, "--json"))
    assert line == {"prompt": "abc", "text": written.text, "tokens": 12, "ended": "length"}


def test_a_question_is_written_down_with_a_template(generate, runs):
    source = saved_model.read_directory("rope")
    tokens = np.array([*b"<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"])
    (ids,) = hn.generate(source.config.model, source.params, [tokens], max_new_tokens=12, stop_ids=[256])
    options = ("--prompt", "abc", "--max-tokens", "12")
    expected = load_tokenizer(source.config.data).decode(ids)
    assert generate("rope", *options, "--chat-template", "chatml") == expected + "\n"
    chatml = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (runs / "chat.jinja").write_text(chatml)
    assert generate("rope", *options, "--chat-template", "chat.jinja") == expected + "\n"


def test_sampling_stop_strings_and_seeds(generate):
    drawn = ("rope", "--prompt", "", "--max-tokens", "40", "--temperature", "1", "--json")
    text = json.loads(generate(*drawn))["text"]
    assert json.loads(generate(*drawn))["text"] == text
    assert json.loads(generate(*drawn, "--seed", "1"))["text"] != text
    stopped = json.loads(generate(*drawn, "--stop", text[3:6]))
    assert stopped["ended"] == "stop"
    assert stopped["text"] == text[: text.find(text[3:6])]


@pytest.mark.parametrize("text", ["- item", "--help me", "-x", "train.steps=3", "run.plugins=[x.py]", "=", "{"])
def test_a_text_may_look_like_an_option_or_a_key(text, generate):
    line = json.loads(generate("rope", "--prompt", text, "--max-tokens", "2", "--stop", text, "--json"))
    assert line["prompt"] == text
    assert line["tokens"] == 2


def test_a_prompt_that_goes_on_with_a_word_keeps_its_space(runs, monkeypatch):
    """The model always writes the token of `two`, before which this tokenizer writes no space where a text begins."""
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "</s>": 2}, unk_token="▁one"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(runs / "words.json"))
    monkeypatch.setattr(text, "generate", lambda *_, on_tokens, **keys: [on_tokens([np.array([1, 1])]), [1, 1]][1:])
    words = load_tokenizer(DataSection(tokenizer=str(runs / "words.json")))
    (written,) = write_text(None, None, words, ["one"], max_new_tokens=2)
    assert written.text == " two two"


def test_a_hugging_face_directory_is_told_its_tokenizer(generate, runs):
    config = hn.ModelConfig(scheme="pre", d_model=16, num_layers=1, num_heads=2, mlp_dim=16, vocab_size=257)
    hn.save_huggingface(
        runs / "hf", config, jax.jit(hn.Decoder(config).init)(jax.random.key(0), np.zeros((1, 1), int))["params"]
    )
    line = generate("hf", "--prompt", "abc", "--max-tokens", "3")
    assert line.startswith("error: hf: no tokenizer is known to belong to it; name its tokenizer.json, or bytes, with")
    assert generate("hf", "--prompt", "abc", "--max-tokens", "3", "--tokenizer", "bytes").endswith("\n")


def test_learned_positions_limit_the_text(generate):
    assert len(json.loads(generate("learned", "--prompt", "abc", "--json"))["text"]) <= 17
    line = generate("learned", "--prompt", "abc", "--max-tokens", "30")
    assert line.startswith("error: a prompt of 4 tokens and max_new_tokens=30 do not fit model.max_positions=20")
    line = generate("learned", "--prompt", "a" * 30)
    assert line.startswith("error: a prompt of 31 tokens and max_new_tokens=1 do not fit model.max_positions=20")


def test_typed_prompts_until_the_end_of_input(generate, monkeypatch, runs):
    lines = iter(["abc", "def"])

    def typed():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    one = generate("rope", "--prompt", "abc", "--max-tokens", "4", "--json")
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(io, "StringIO", Terminal)
    both = generate("rope", "--max-tokens", "4", "--json").splitlines()
    # Standard output, which is no terminal here, gets nothing else.
    assert [json.loads(line)["prompt"] for line in both] == ["abc", "def"]
    assert both[0] + "\n" == one


def test_a_typed_prompt_that_cannot_be_does_not_end_the_session(generate, monkeypatch):
    lines = iter(["a" * 30, "a\udcffb", "abc"])

    def typed():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    told = io.StringIO()
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.setattr(sys, "stderr", told)
    (line,) = generate("learned", "--max-tokens", "4", "--json").splitlines()
    assert json.loads(line)["prompt"] == "abc"
    assert "error: a prompt of 31 tokens and max_new_tokens=4 do not fit" in told.getvalue()
    assert "error: standard input: not UTF-8 text" in told.getvalue()


def test_a_file_is_read_as_training_reads_it(generate, runs):
    (runs / "windows.txt").write_bytes(b"\xef\xbb\xbfabc\r\n")
    line = generate("rope", "--file", "windows.txt", "--max-tokens", "1", "--json")
    assert json.loads(line)["prompt"] == "abc\r\n"
    line = generate("rope", "--max-tokens", "1", "--json", typed="\ufeffabc\r\n")
    assert json.loads(line)["prompt"] == "abc\r\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["rope/plugins"], "rope/plugins: no such directory"),
        (["rope", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["rope", "--top-p", "2"], "--top-p=2.0: must be above 0 and at most 1"),
        (["rope", "--temperature", "nan"], "--temperature=nan: "),
        (["rope", "--seed", "-1"], "--seed -1: must be between 0 and 4,294,967,295"),
        (["rope", "--stop", ""], "--stop: an empty text would end every text at once"),
        (["rope", "--file", "nowhere.txt"], "--file nowhere.txt: No such file or directory"),
        (["rope", "--file", "rope"], "--file rope: no regular file; name a file of UTF-8 text"),
        (["rope", "--file", "rope/checkpoints"], "--file rope/checkpoints: no regular file"),
        (["rope", "--prompt"], "hybridnorm generate: argument --prompt: expected one argument"),
        (["rope", "--prompt", "--json"], "hybridnorm generate: argument --prompt: expected one argument"),
        (
            ["rope", "--seed", "9" * 30],
            "--seed 999999999999999999999999999999: must be between 0 and 4,294,967,295",
        ),
        (["rope", "--prompt", "x", "--file", "a.txt"], "hybridnorm generate: argument --file: not allowed with"),
        (["rope", "--temprature", "1"], "--temprature: no such option of `hybridnorm generate`; did you mean"),
        (["rope", "train.steps=3"], "train.steps=3: a key of `hybridnorm train`, not of `hybridnorm generate`"),
        (["rope", "--tokenizer", "nowhere.json"], "--tokenizer nowhere.json: nowhere.json: cannot be read"),
        (
            [GPT2, "--tokenizer", "bytes"],
            "--tokenizer bytes: has 257 tokens, but the model knows 61; name",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_ends_in_one_line(arguments, message, generate):
    assert generate(*arguments, typed="x").startswith(f"error: {message}")


def test_standard_input_that_is_no_text_is_refused(generate):
    """Where the environment has no UTF-8, Python stands such characters for bytes that it cannot read."""
    assert generate("rope", typed="a\udcffb") == "error: standard input: not UTF-8 text"
