"""Prompts with completions, and conversations: their parts, their tokens, and which of these are learned."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text.answers import Chatml, Message, Part, messages_of, prompt_parts
from hybridnorm_jax.data.text.chat_templates import load_template
from hybridnorm_jax.data.tokens.answer_tokens import encode_records
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer, load_tokenizer

TALK = [Message("system", "Be brief."), Message("user", "Hi there"), Message("assistant", "Hello.\nYes?")]
TALK += [Message("user", "Bye"), Message("assistant", "Bye bye")]
LLAMA = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' "
    "+ message['content'] | trim + '<|eot|>' }}{%- endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<s>", "</s>")


@pytest.fixture
def tokenizer_file(tmp_path):
    """A byte-level tokenizer.json with special tokens from id 258 on, and merges that reach over a new line."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"Ċ" + "Ċ": 256, "He": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("H", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer(tokenizer_file):
    return load_tokenizer(DataSection(tokenizer=str(tokenizer_file)))


def learned(tokenizer, parts):
    """The tokens that are learned, as the vocabulary spells them, in stretches; and whether the separator is."""
    ((ids, is_target, ends),) = encode_records(tokenizer, [parts])
    cuts = np.flatnonzero(np.diff(is_target.astype(int))) + 1
    stretches = [
        spelled(tokenizer, part)
        for part, on in zip(np.split(ids, cuts), np.split(is_target, cuts), strict=True)
        if on[0]
    ]
    return stretches, ends


def spelled(tokenizer, ids):
    if tokenizer.name == "bytes":
        return tokenizer.decode(ids)
    return tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_of_a_prompt_and_a_completion_the_completion_and_the_end_are_learned(tokenizer):
    parts = prompt_parts({"prompt": "Hi He", "completion": "llo </s>", "more": 1}, "f:1")
    for each in (tokenizer, ByteTokenizer()):
        assert learned(each, parts) == (["llo </s>"], True)
    # The two are tokenized alone, as when the model is asked; and a token that a text spells out is plain text.
    ((ids, _, _),) = encode_records(tokenizer, [prompt_parts({"prompt": "H", "completion": "ello </s>"}, "f:1")])
    assert 257 not in ids
    assert tokenizer.special_tokens["</s>"] not in ids


def test_chatml_learns_what_the_assistant_says_and_its_end(tokenizer):
    parts = Chatml().parts(TALK, "f:1")
    written = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello.\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nBye bye<|im_end|>\n"
    )
    for each in (tokenizer, ByteTokenizer()):
        ((ids, _, _),) = encode_records(each, [parts])
        assert spelled(each, ids) == written
        assert learned(each, parts) == (["Hello.\nYes?<|im_end|>", "Bye bye<|im_end|>"], False)


def test_a_question_ends_where_the_answer_begins(tmp_path):
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(part.text for part in Chatml().parts([Message("user", "Hi")], "f", asks=True)) == written
    asking = LLAMA + "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    parts = template(tmp_path, asking).parts([Message("user", "Hi")], "f", asks=True)
    assert "".join(part.text for part in parts) == "<s><|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n"


def template(tmp_path, source, **config):
    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    (directory / "chat_template.jinja").write_text(source)
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return load_template(str(directory / "chat_template.jinja"))


def test_a_template_of_jinja_gives_the_tokens_of_the_text_that_it_writes(tokenizer, tokenizer_file, tmp_path):
    parts = template(tmp_path, LLAMA).parts(TALK, "f:1")
    written = "<s>" + "".join(f"<|start|>{role}<|end|>\n\n{content}<|eot|>" for role, content in TALK)
    ((ids, _, _),) = encode_records(tokenizer, [parts])
    assert ids.tolist() == Tokenizer.from_file(str(tokenizer_file)).encode(written, add_special_tokens=False).ids
    assert learned(tokenizer, parts) == (["Hello.\nYes?<|eot|>", "Bye bye<|eot|>"], False)


def test_a_conversation_that_ends_with_the_separator_has_one_and_learns_it(tokenizer_file, tmp_path):
    tokenizer = load_tokenizer(DataSection(tokenizer=str(tokenizer_file), separator="</s>"))
    parts = template(tmp_path, MISTRAL).parts(TALK[1:], "f:1")
    ((ids, _, _),) = encode_records(tokenizer, [parts])
    assert spelled(tokenizer, ids) == "<s>[INST] Hi there [/INST] Hello.\nYes?</s>[INST] Bye [/INST] Bye bye"
    assert learned(tokenizer, parts) == (["Hello.\nYes?</s>", "Bye bye"], True)


def test_where_nothing_ends_an_answer_the_separator_does(tokenizer, tmp_path):
    plain = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    assert learned(tokenizer, template(tmp_path, plain).parts(TALK, "f:1")) == (["Hello.\nYes?", "Bye bye"], True)


def test_a_content_that_spells_a_special_token_gets_none(tokenizer, tmp_path):
    talk = [Message("user", "<|eot|><|start|>assistant"), Message("assistant", "I say <|eot|> now")]
    parts = template(tmp_path, LLAMA).parts(talk, "f:1")
    ((ids, _, _),) = encode_records(tokenizer, [parts])
    assert (ids == tokenizer.special_tokens["<|eot|>"]).sum() == 2
    assert learned(tokenizer, parts) == (["I say <|eot|> now<|eot|>"], False)
    assert spelled(tokenizer, ids) == "".join(part.text for part in parts)


def test_a_template_may_strip_what_is_said(tokenizer, tmp_path):
    talk = [Message("user", " Hi "), Message("assistant", "\n yes ")]
    assert learned(tokenizer, template(tmp_path, LLAMA).parts(talk, "f:1")) == (["yes<|eot|>"], False)


def test_an_answer_between_generation_tags_is_an_answer(tokenizer, tmp_path):
    tagged = LLAMA.replace("{{- '<|start", "{% generation %}{{- '<|start").replace(
        "{%- endfor", "{% endgeneration %}{%- endfor"
    )
    parts = template(tmp_path, tagged).parts(TALK, "f:1")
    assert parts == template(tmp_path, LLAMA).parts(TALK, "f:1")


def test_a_template_is_found_in_the_file_that_is_named(tmp_path):
    template(tmp_path, LLAMA)
    for content in (LLAMA, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA}]):
        template(tmp_path, LLAMA, chat_template=content)
        named = load_template(str(tmp_path / "model" / "tokenizer_config.json"))
        assert named.parts(TALK, "f:1") == template(tmp_path, LLAMA).parts(TALK, "f:1")
    assert isinstance(load_template("chatml"), Chatml)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("{{ messages[0].content | upper }}", "changes or leaves out what is said"),
        ("{{ messages[0].content }}", "changes or leaves out what is said"),
        ("{{ raise_exception('only pairs') }}", "refuses the conversation: only pairs"),
        (
            "{{ ''.__class__.__mro__ }}",
            "refuses the conversation: access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "refuses the conversation: "),
        ("{{ nothing.here }}", "refuses the conversation: 'nothing' is undefined"),
    ],
)
def test_a_template_that_does_something_else_is_one_line(tmp_path, source, wrong):
    with pytest.raises(DataError) as error:
        template(tmp_path, source).parts(TALK, "f.jsonl:3")
    assert str(error.value).startswith(f"f.jsonl:3: data.chat_template={tmp_path}/model/chat_template.jinja {wrong}")
    assert "\n" not in str(error.value)


def test_files_that_hold_no_template_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"^data\.chat_template=chatm: .*; give chatml, or the file of a chat template$"
    ):
        load_template("chatm")
    with pytest.raises(DataError, match=r"not a Jinja template \(line 2: "):
        template(tmp_path, "x\n{% for")
    for content in ("{", "[]", "{}"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(
            DataError, match=r"^data\.chat_template=\S+tokenizer_config\.json: (not JSON|must hold|has no)"
        ):
            load_template(str(tmp_path / "tokenizer_config.json"))


SAYS = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"text": "x"}, "the record has no field 'messages' (data.records=messages); it has: text"),
        ({"messages": "x"}, "'messages' must hold a list of messages, not a string"),
        ({"messages": []}, "'messages' must hold a list of messages, not an empty list"),
        ({"messages": [SAYS, 1]}, "message 2: is a number, but must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "message 1: has no field 'content'; it has: role"),
        ({"messages": [SAYS | {"content": None}]}, "message 1: field 'content' must hold a string, not null"),
        ({"messages": [SAYS | {"role": "<|im_end|>"}]}, "message 1: role '<|im_end|>' is no name"),
        ({"messages": [SAYS | {"role": "user"}]}, "no message has the role 'assistant'"),
    ],
)
def test_a_record_that_is_no_conversation_is_one_line(record, wrong):
    with pytest.raises(DataError) as error:
        messages_of(record, "f.jsonl:7")
    assert str(error.value).startswith(f"f.jsonl:7: {wrong}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"completion": "x"}, "has no field 'prompt'; it has: completion"),
        ({"prompt": 1, "completion": "x"}, "field 'prompt' must hold a string, not a number"),
        ({"prompt": "", "completion": ""}, "prompt and completion are both empty"),
    ],
)
def test_a_record_without_a_prompt_or_a_completion_is_one_line(record, wrong):
    with pytest.raises(DataError) as error:
        prompt_parts(record, "f.jsonl:7")
    assert str(error.value).startswith(f"f.jsonl:7: {wrong}")
    assert "\n" not in str(error.value)


def test_many_records_are_tokenized_as_each_alone(tokenizer):
    records = [Chatml().parts(TALK, "f"), [Part("a"), Part("b", is_target=True)], Chatml().parts(TALK[:3], "f")]
    records += [Chatml().parts([Message("user", "<|im_end|>"), TALK[2]], "f")]
    for one, alone in zip(encode_records(tokenizer, records), records, strict=True):
        (expected,) = encode_records(tokenizer, [alone])
        assert one.ids.tolist() == expected.ids.tolist()
        assert one.is_target.tolist() == expected.is_target.tolist()


CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shapes that published models have.
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "lines": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] "
    "+ eos_token }}\n{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}"
    "\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 9 %}{% break %}{% endif %}"
    "[{{ m.role | upper }}] {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}",
}


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes(name, tmp_path):
    """Whole conversations, and those in which the assistant is to answer."""
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    for talk, asks in ((TALK[1:], False), (TALK[1:4], True)):
        messages = [message._asdict() for message in talk]
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        (expected,), _ = utilities.render_jinja_template(
            [messages], chat_template=TEMPLATES[name], add_generation_prompt=asks, **tokens
        )
        templates = [template(tmp_path, TEMPLATES[name]), *([Chatml()] if name == "chatml" else [])]
        for each in templates:
            parts = each.parts(talk, "f", asks=asks)
            assert "".join(part.text for part in parts) == expected
            says = [part.text for part in parts if part.is_target and not part.is_markup]
            assert says == [message.content for message in talk if message.role == "assistant"]
