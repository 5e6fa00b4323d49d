"""Long texts in pieces: always the ids of the whole text."""

import inspect
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.tokens import token_pieces

SOURCE = inspect.getsource(random) + inspect.getsource(json.decoder)
ODD = [
    "\n\n",
    "  ",
    "\r\n",
    "don't ",
    "été ",
    "中文字\uff0c",
    "e\u0301",
    "<s>",
    "<mask>",
    " <mask> ",
    "1234",
    "👩\u200d👧",
    "\u00a0",
    "!!\n",
]
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def odd_text() -> str:
    choose = random.Random(0)
    words = SOURCE.split()
    parts = [choice for _ in range(3000) for choice in (choose.choice(ODD), choose.choice(words), choose.choice(" \n"))]
    return "".join(parts) + "a" * 3000 + " " * 3000 + "end " * 500


def trained(model, trainer, pre, norm=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if norm is not None:
        tokenizer.normalizer = norm
    tokenizer.train_from_iterator([SOURCE, odd_text()[:3000]], trainer)
    return tokenizer


def bpe(pre, norm=None):
    special = ["<s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, pre, norm)


def unigram(pre):
    trainer = trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<s>", "<unk>"], unk_token="<unk>"
    )
    return trained(models.Unigram(), trainer, pre, normalizers.NFKC())


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["<s>", "<unk>"])
    pre, norm = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return trained(models.WordPiece(unk_token="<unk>"), trainer, pre, norm)


def without_words():
    """As Llama 2: one word from begin to end, in which every space is U+2581."""
    settings = json.loads(bpe(pre_tokenizers.Metaspace()).to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    settings |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}
    return Tokenizer.from_str(json.dumps(settings))


def with_added_tokens():
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False), AddedToken("\n\n")])
    return tokenizer


SPLIT = [pre_tokenizers.Split(Regex(GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
TOKENIZERS = {
    "GPT-2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "added tokens": with_added_tokens,
    "Llama 3": lambda: bpe(pre_tokenizers.Sequence(SPLIT), normalizers.NFC()),
    "Llama 2": without_words,
    "T5": lambda: unigram(pre_tokenizers.Metaspace()),
    "XLM-R": lambda: unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])),
    "BERT": wordpiece,
}


def long_text(tokenizer, name="t"):
    settings = json.loads(tokenizer.to_str())
    return token_pieces.LongText(
        name,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        token_pieces.obstacle(settings),
        token_pieces.cuts_inside_words(settings),
    )


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(token_pieces, "WINDOW", 2048)
    monkeypatch.setattr(token_pieces, "BEYOND", 512)
    monkeypatch.setattr(token_pieces, "NOT_COMPARED", 128)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_have_the_ids_of_the_whole_text(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.encode_special_tokens = True
    for text in (SOURCE, odd_text()):
        long = long_text(tokenizer)
        pieces = [piece for start in range(0, len(text), 777) for piece in long.feed(text[start : start + 777])]
        assert len(pieces) > 3
        pieces.append(long.finish())
        assert "".join(part for part, _ in pieces) == text
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        np.testing.assert_array_equal(np.concatenate([ids for _, ids in pieces]), expected)


@pytest.mark.parametrize(
    ("regex", "may_be_cut"),
    [(GPT4, True), (r"(?<=a)b", False), (r"\bword\b", False), (r"a(?=.*z)", False), (r"^.*$", False), (r"[^a]+", True)],
)
def test_a_regular_expression_that_looks_around_forbids_cuts(regex, may_be_cut):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(regex), "isolated")
    assert (token_pieces.obstacle(json.loads(tokenizer.to_str())) is None) == may_be_cut


@pytest.mark.usefixtures("short_windows")
def test_a_long_text_that_must_not_be_cut_is_refused(monkeypatch):
    monkeypatch.setattr(token_pieces, "LONGEST_AT_ONCE", 10_000)
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    long_text(tokenizer).feed(SOURCE[:20_000])
    with pytest.raises(DataError, match=r"data\.tokenizer=t: .*no place to cut"):
        long_text(tokenizer).feed("a" * 40_000)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\b"), "isolated")
    with pytest.raises(DataError, match=r"data\.tokenizer=t: .*regular expression"):
        long_text(tokenizer).feed(SOURCE[:20_000])


def test_what_never_ends_is_stopped():
    with pytest.raises(DataError, match="may never end"):
        token_pieces.within_time("data.tokenizer=x", 0.05, lambda: time.sleep(1))


MEASURE = """
import resource, sys
import numpy as np
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.data import open_data

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
config = parse(sys.argv[1:])
data = open_data(config.data, seq_len=256, vocab_size=700, progress=False)
print(peak() - before, data.train.num_tokens)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "one line"])
def test_64_mb_of_text_are_tokenized_in_less_than_1_gb(lines, tmp_path):
    bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)).save(str(tmp_path / "tokenizer.json"))
    text = SOURCE if lines else SOURCE.replace("\n", " ")
    (tmp_path / "big.txt").write_text(text * ((64 << 20) // len(text) + 1))
    arguments = [
        f"data.files=[{tmp_path}/big.txt]",
        f"data.tokenizer={tmp_path}/tokenizer.json",
        f"data.cache_dir={tmp_path}/cache",
        "data.separator=<s>",
        "data.source=text",
    ]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, tokens = map(int, done.stdout.split())
    assert tokens > (64 << 20) / 10
    assert grown < 1 << 30
