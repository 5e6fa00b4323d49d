"""The section `data` of a configuration."""

import dataclasses
from collections.abc import Sequence

from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.mixture_section import (
    UNITS,
    SourceSection,
    Stage,
    StageSection,
    check_mixture,
    stages_of,
)
from hybridnorm_jax.config.record_filter import parse_conditions
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key, present

# How documents become rows: data.packing.
PACKINGS = ("windows", "documents", "padded")
# What records hold: data.records.
RECORDS = ("text", "prompt", "messages")
CHATML = "chatml"
SOURCES = ("stdlib", "text", "tokens")
# data.tokenizer of a model that came without one.
UNKNOWN_TOKENIZER = "unknown"
TOKEN_DTYPES = ("uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What is read, how it becomes tokens, and what is held out."""

    source: str = key(
        "stdlib", "stdlib (this Python's own sources) | text (.txt, .jsonl, .parquet, .tar, ...) | tokens (.npy, .bin)"
    )
    files: tuple[str, ...] = key(
        (), "paths, glob patterns, URLs (gs://, s3://, hf://, https://) or @LIST, for text and tokens"
    )
    mixture: dict[str, SourceSection] = key(
        {}, "several sources instead of data.files, each with a name and keys of its own"
    )
    mixture_unit: str = key("tokens", "what the weights of a mixture are shares of: tokens | documents")
    stages: tuple[StageSection, ...] = key(
        (),
        "later weights of a mixture, such as [{at: 0.9, weights: {web: 1, math: 3}}]: after so many steps, or below 1 "
        "after this share of train.steps; a source that is left out is not read any more",
    )
    tokenizer: str = key(
        "bytes", "bytes, or the path of a Hugging Face tokenizer.json; unknown: of a model that came without one"
    )
    separator: str = key("", "token that ends a document, such as <|endoftext|>; empty: found in tokenizer.json")
    token_dtype: str = key("uint16", "dtype of raw .bin token files: uint16 | uint32 (.npy files carry their own)")
    separator_id: int | None = key(
        None, "id that ends a document in token files, for segment ids; null: unknown", at_least=0, at_most=2**32 - 1
    )
    text_field: str = key("text", "field of records (.jsonl, .parquet, .arrow, .tar) that holds the text")
    records: str = key(
        "text",
        "what records hold: text | prompt (with a completion, which alone is learned) | messages (a conversation, of "
        "which what the assistant says is learned)",
    )
    chat_template: str = key(
        CHATML,
        "how conversations are written down: chatml, or a file with a chat template in Jinja, which runs in a sandbox "
        "and needs the extra `chat`",
    )
    filter: tuple[str, ...] = key((), "only records that meet every condition, such as 'language == en' (docs/data.md)")
    validation_fraction: float = key(
        0.02, "share of documents held out, chosen by a hash of each one's identity", at_least=0, below=1
    )
    validation: dict[str, tuple[str, ...]] = key({}, "further validation sets: name -> files, as data.files")
    packing: str = key(
        "windows",
        "windows (a row runs across documents) | documents (a row holds whole ones, packed, kept apart as by "
        "data.segment_ids) | padded (one document a row)",
    )
    segment_ids: bool = key(False, "documents do not attend to each other, and positions restart in each")
    fim_rate: float = key(
        0.0, "share of documents that are trained on with their middle last (fill in the middle)", at_least=0, at_most=1
    )
    fim_spm_rate: float = key(
        0.5, "share of these in the order suffix, prefix, middle; others: prefix, suffix, middle", at_least=0, at_most=1
    )
    fim_tokens: tuple[str, ...] = key(
        (), "the special tokens before prefix, suffix and middle, as names or ids, such as [<PRE>, <SUF>, <MID>]"
    )
    cache_dir: str = key("~/.cache/hybridnorm_jax", "where tokenized text, and copies of remote files, are kept")
    cache_gib: float = key(64.0, "GiB that copies of remote files may take there", above=0, at_most=10**9)
    read_threads: int = key(2, "threads that read windows ahead", at_least=1, at_most=1024)

    def __post_init__(self) -> None:
        check_fields("data", self)
        check_choice("data.source", self.source, SOURCES)
        check_choice("data.token_dtype", self.token_dtype, TOKEN_DTYPES)
        check_choice("data.packing", self.packing, PACKINGS)
        check_choice("data.mixture_unit", self.mixture_unit, UNITS)
        self._check_mixture()
        needs = self.source == "stdlib" or bool(self.files)
        check(needs, "data.files", self.files, f"data.source={self.source} needs at least one file")
        only = self.source != "stdlib" or not self.files
        check(only, "data.files", self.files, "data.source=stdlib reads no files; use data.source=text")
        only = self.separator_id is None or self.reads_tokens
        check(only, "data.separator_id", self.separator_id, "only for data.source=tokens; text has data.separator")
        only = not self.filter or self.source == "text" or bool(self.mixture)
        check(only, "data.filter", self.filter, "only for data.source=text, whose records have fields")
        parse_conditions(self.filter)
        self._check_fim()
        check_choice("data.records", self.records, RECORDS)
        only = self.records == "text" or self.source == "text" or bool(self.mixture)
        check(only, "data.records", self.records, "only for data.source=text")
        only = self.chat_template == CHATML or "messages" in (
            self.records,
            *(one.records for one in self.mixture.values()),
        )
        check(only, "data.chat_template", self.chat_template, "only for data.records=messages")
        for name in self.validation:
            right = "a validation set needs a name in printable characters: it stands in lines of the log and of tables"
            check(bool(name.strip()) and name.isprintable(), "data.validation", [name], right)

    def _check_fim(self) -> None:
        if not self.fim_rate:
            check(not self.fim_tokens, "data.fim_tokens", self.fim_tokens, "needs data.fim_rate")
            return
        right = "needs data.packing=documents or padded, whose rows have room for three more tokens in every document"
        check(self.packing != "windows", "data.fim_rate", self.fim_rate, right)
        right = "must be three that differ: what stands before the prefix, the suffix and the middle"
        check(len(set(self.fim_tokens)) == len(self.fim_tokens) == 3, "data.fim_tokens", self.fim_tokens, right)
        right = f"not with data.records={self.records}, of which only a part is learned"
        check(self.records == "text", "data.fim_rate", self.fim_rate, right)

    def _check_mixture(self) -> None:
        if not self.mixture:
            check(not self.stages, "data.stages", self.stages, "needs data.mixture, the sources")
            return
        right = "with data.mixture each source names its own files; leave it out"
        check(not self.files, "data.files", self.files, right)
        check(self.source == "stdlib", "data.source", self.source, right)
        check_mixture(self.mixture, self.stages, sources=SOURCES)
        for name, one in self.mixture.items():
            if one.records is not None:
                where = f"data.mixture.{name}.records"
                check_choice(where, one.records, RECORDS)
                check(one.records == "text" or one.kind == "text", where, one.records, "only for a source of text")
                right = "not with data.fim_rate: only a part of such records is learned"
                check(one.records == "text" or not self.fim_rate, where, one.records, right)
            if one.filter:
                parse_conditions(one.filter)
                check(one.kind == "text", f"data.mixture.{name}.filter", one.filter, "only for a source of text")
            if one.token_dtype is not None:
                check_choice(f"data.mixture.{name}.token_dtype", one.token_dtype, TOKEN_DTYPES)
            both = self.validation_fraction > 0 and name in self.validation
            right = "the held-out part of the source has that name; choose another"
            check(not both, f"data.validation.{name}", self.validation.get(name, ()), right)

    def mixture_stages(self, steps: int) -> tuple[Stage, ...]:
        """The stages of a run of so many steps; without a mixture none.

        Raises:
          ConfigError: a stage does not come after the one before it and before the end.
        """
        return stages_of(self.mixture, self.stages, steps) if self.mixture else ()

    @property
    def sources(self) -> dict[str, "DataSection"]:
        """Name -> the data section that reads that source alone; without a mixture "" -> this one."""
        return {name: self._source(one) for name, one in self.mixture.items()} or {"": self}

    def _source(self, one: SourceSection) -> "DataSection":
        kind = present(one.kind)
        records = (one.records or self.records) if kind == "text" else "text"
        return dataclasses.replace(
            self,
            source=kind,
            files=one.files,
            text_field=self.text_field if one.text_field is None else one.text_field,
            token_dtype=self.token_dtype if one.token_dtype is None else one.token_dtype,
            filter=(self.filter if one.filter is None else one.filter) if kind == "text" else (),
            records=records,
            chat_template=self.chat_template if records == "messages" else CHATML,
            separator_id=self.separator_id if kind == "tokens" else None,
            mixture={},
            stages=(),
            validation={},
        )

    def kind_of_set(self, files: Sequence[str]) -> str:
        """What reads the files of a validation set, text or tokens: as data.source, or in a mixture as their names."""
        if not self.mixture:
            return "tokens" if self.source == "tokens" else "text"
        kinds = {source_of(name) for name in files} - {None}
        if len(kinds) == 1:
            return str(kinds.pop())
        return "text" if self.reads_text else "tokens"

    @property
    def reads_tokens(self) -> bool:
        """Whether a source is token files."""
        return any(one.kind == "tokens" for one in self.mixture.values()) or self.source == "tokens"

    @property
    def reads_text(self) -> bool:
        """Whether a source is text, which a tokenizer reads."""
        return any(one.kind != "tokens" for one in self.mixture.values()) if self.mixture else self.source != "tokens"

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether a row says which document a token belongs to, so that none attends to another."""
        return self.segment_ids or self.packing == "documents"

    @property
    def follows_separator(self) -> bool:
        """Whether a document comes behind a separator that the model reads: only where a row runs across documents."""
        return self.packing == "windows" and not self.segment_ids

    @property
    def has_tokenizer_file(self) -> bool:
        """Whether the tokenizer is a file."""
        return self.tokenizer not in ("bytes", UNKNOWN_TOKENIZER)

    @property
    def knows_tokenizer(self) -> bool:
        """Whether this says which tokenizer is the model's: whoever reads token files need not name theirs."""
        return self.tokenizer != UNKNOWN_TOKENIZER and (self.reads_text or self.has_tokenizer_file)
