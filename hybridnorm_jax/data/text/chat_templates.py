"""Which chat template conversations are written down with.

A template is a program. It runs only where data.chat_template names its file: one that merely lies beside a tokenizer
is never looked at.
"""

import json
from typing import Any

from etils import epath

from hybridnorm_jax.config.data_section import CHATML, DataSection
from hybridnorm_jax.data.files.identity import regular_file_size
from hybridnorm_jax.data.text.answers import AnswerRecords, Chatml, Template
from hybridnorm_jax.errors import DataError, MissingExtraError, first_line
from hybridnorm_jax.whole_files import expanded

MOST_TEMPLATE_BYTES = 1 << 20
CONFIG = "tokenizer_config.json"


def answer_records(section: DataSection) -> AnswerRecords | None:
    """How the records that a data section names are read; None: all of their text is learned.

    Raises:
      DataError, MissingExtraError: as load_template.
    """
    if section.records == "text":
        return None
    return AnswerRecords(None if section.records == "prompt" else load_template(section.chat_template))


def load_template(named: str, *, what: str | None = None) -> Template:
    """The template that data.chat_template names: "chatml", a file of Jinja, or a tokenizer_config.json with one.

    Args:
      named: chatml or a file.
      what: names it in messages, where data.chat_template does not.

    Raises:
      DataError: the file cannot be read, or holds no template.
      MissingExtraError: Jinja is not installed.
    """
    if named == CHATML:
        return Chatml()
    path = epath.Path(expanded(named))
    what = f"data.chat_template={named}" if what is None else what
    content = _read(path, what)
    if path.suffix == ".json":
        settings = _settings(content, what)
        source = _template_of(settings, what)
    else:
        beside = path.parent / CONFIG
        settings = _settings(_read(beside, what), f"{what}: {beside}") if beside.exists() else {}
        source = content
    try:
        from hybridnorm_jax.data.text.jinja_template import JinjaTemplate
    except ModuleNotFoundError as error:
        raise MissingExtraError(what, extra="chat") from error
    tokens = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token")}
    return JinjaTemplate(source, tokens, what)


def _read(path: epath.Path, what: str) -> str:
    try:
        size = regular_file_size(path)
        if size > MOST_TEMPLATE_BYTES:
            raise DataError(f"{path}: {size} bytes, but no template has more than {MOST_TEMPLATE_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{what}: {reason}; give chatml, or the file of a chat template") from error


def _settings(content: str, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(content)
    except ValueError as error:
        raise DataError(f"{what}: not JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        raise DataError(f"{what}: must hold an object")
    return settings


def _template_of(settings: dict[str, Any], what: str) -> str:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise DataError(f"{what}: has no chat_template; name the file that has it, such as chat_template.jinja")
    return template


def _token(token: Any) -> str:
    """A special token of a tokenizer_config.json: as text, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
