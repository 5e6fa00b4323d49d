"""What the parameters that a run begins with were trained on: none of it is validation of the run.

A checkpoint holds the identities of the files that were trained on (run_identity.data_files), and what its parameters
were trained on before by other runs, one after the other (init_from). `hybridnorm convert` passes them on. One
without identities says nothing: parameters alone were saved (hn.save_run, another program's model that was converted),
or a version that kept none saved it.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import Data, DataError, Tokenizer
from hybridnorm_jax.data.files.identity import WHOLE_BYTES, identities
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.text.sources import holds_whole_files_out
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.held_out import TRAINING_SET
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.run_identity import TOKENIZER_FILE, data_files
from hybridnorm_jax.training.trained_sources import SOURCES, selection, sources_as_json

Files = Sequence[dict[str, Any]]
# In the data state of a checkpoint: what other runs trained the parameters on, and Data.is_split_by_hash of its own.
TRAINED_BEFORE, SPLIT_BY_HASH = "trained_before", "is_split_by_hash"
# There too: Data.made_by.
MADE_BY = "tokenizer_fingerprint"
BYTES = ByteTokenizer.fingerprint


@dataclasses.dataclass(frozen=True)
class Trained:
    """Data that a run trained on, as a checkpoint keeps them for the runs that begin with it: one source of them.

    Attributes:
      source, validation_fraction: as in its data section.
      files: as run_identity.data_files gives them, without the name of the source.
      is_split_by_hash: as in dataset.Source.
      name: of the source in data.mixture; empty without a mixture.
      selects: which part of a record is its text, see trained_sources.selection; None: unknown, or there is no text.
      tokenizer: the fingerprint of the one that made the ids; None: unknown, or saved by a version that did not say it.
    """

    source: str
    validation_fraction: float
    files: list[dict[str, Any]]
    is_split_by_hash: bool = True
    name: str = ""
    selects: str | None = None
    tokenizer: str | None = None


def training_data(section: DataSection, data: Data) -> list[Trained]:
    """What a run with this data section trains on, or what an evaluation would, by source."""
    return [_of_source(source) for source in sources_as_json(section, data)]


def _of_source(source: Mapping[str, Any]) -> Trained:
    names = {field.name for field in dataclasses.fields(Trained)}
    return Trained(**{name: value for name, value in source.items() if name in names})


def own_data(section: DataSection, data: Data) -> dict[str, Any]:
    """What the data state of a checkpoint says of the data of its own run, besides its files."""
    if section.mixture:
        return {SOURCES: sources_as_json(section, data)}
    made_by = {} if data.made_by is None else {MADE_BY: data.made_by}
    return {SPLIT_BY_HASH: data.first.is_split_by_hash, **made_by}


def trained_before(data_state: Mapping[str, Any]) -> list[Trained]:
    """What other runs trained the parameters of a checkpoint on, the first run first."""
    return [Trained(**one) for one in data_state.get(TRAINED_BEFORE, ())]


def trained_on(data_state: Mapping[str, Any], saved: DataSection) -> list[Trained]:
    """All that is known of what the parameters of a checkpoint were trained on, the checkpoint's own run last.

    Args:
      saved: the data section of that run.
    """
    known = trained_before(data_state)
    if was_trained(data_state):
        by_hash = data_state.get(SPLIT_BY_HASH, True)
        fraction, selects = saved.validation_fraction, selection(saved)
        made_by = data_state.get(MADE_BY)
        own = [Trained(saved.source, fraction, data_state["files"], by_hash, selects=selects, tokenizer=made_by)]
        if SOURCES in data_state:
            own = [_of_source(source) for source in data_state[SOURCES]]
        known = [one for one in known if one not in own] + own
    return known


def was_trained(data_state: Mapping[str, Any]) -> bool:
    """Whether the run of a checkpoint trained it: a run that was converted or saved has no data files of its own."""
    return "files" in data_state


def as_json(known: Sequence[Trained]) -> list[dict[str, Any]]:
    """As the data state of a checkpoint has it under TRAINED_BEFORE."""
    optional = ("name", "selects", "tokenizer")
    return [
        {name: value for name, value in dataclasses.asdict(one).items() if name not in optional or value}
        for one in known
    ]


def check_beginning(
    data_state: Mapping[str, Any], saved: DataSection, asked: DataSection, now: Sequence[Trained], *, where: str
) -> list[Trained]:
    """What was trained on before a run that begins with the parameters of a checkpoint.

    Args:
      data_state: of the checkpoint.
      saved, asked: the data section that it was trained with, and that of the run that begins with it.
      now: what that run trains on.
      where: what was saved, for messages.

    Raises:
      ConfigError: another tokenizer, or validation sets of what was trained on.
    """
    known = trained_on(data_state, saved)
    if known:
        check_tokenizer(known, asked, now, where=where)
    else:
        _check_tokenizer_file(saved, asked, now, where=where)
        # A checkpoint of parameters alone has no data state, and other programs' models come so.
        if data_state:
            unknown = "was saved by a version that kept no digests of data; it may have been trained on what is"
            say(f"note: {where} {unknown} validation here", file=sys.stderr)
    check_validation(known, asked, now, where=where)
    return known


def check_tokenizer(known: Sequence[Trained], asked: DataSection, now: Sequence[Trained], *, where: str) -> None:
    """Refuse another tokenizer than the parameters were trained with, wherever its file lies.

    Whoever reads token files need not name their tokenizer; directories of `hybridnorm tokenize` say it themselves. So
    the last run that says its tokenizer is asked, and if none does, or `now` does not, there is nothing to compare.

    Args:
      known: what they were trained on.
      asked, now: the data section of this program, and what it trains on.
      where: what was saved, for the message.

    Raises:
      ConfigError: says which of the two has which.
    """
    saying, saying_now = ([one for one in each if _says_tokenizer(one)] for each in (known, now))
    if not saying or not saying_now:
        return
    before, after = saying[-1], saying_now[-1]
    if _may_be_of_one_tokenizer(before, after):
        return
    kinds = {True: "bytes", False: "a tokenizer.json"}
    was_bytes, is_bytes = (_fingerprint(one) == BYTES for one in (before, after))
    if not _names_tokenizer(after):
        wrong = f"its tokens were made by another tokenizer than those that {where} was trained on"
        raise ConfigError(f"data: {wrong}; name tokens that the same one has made")
    wrong = f"{asked.tokenizer} has another content than the tokenizer that {where} was trained with"
    if was_bytes or is_bytes:
        wrong = f"{where} was trained with {kinds[was_bytes]}, not with {kinds[is_bytes]}"
    raise ConfigError(f"data.tokenizer: {wrong}; name the tokenizer that it was trained with")


def check_tokenizer_alone(known: Sequence[Trained], asked: DataSection, tokenizer: Tokenizer, *, where: str) -> None:
    """`check_tokenizer` for a program that reads the tokenizer that `asked` names, and no data."""
    check_tokenizer(known, asked, _tokenizer_alone(asked, tokenizer.fingerprint), where=where)


def _tokenizer_alone(section: DataSection, fingerprint: str | None = None) -> list[Trained]:
    source = "text" if section.reads_text else "tokens"
    files = data_files(section, {})
    return [Trained(source, section.validation_fraction, files, tokenizer=fingerprint)]


def check_validation(known: Sequence[Trained], asked: DataSection, now: Sequence[Trained], *, where: str) -> None:
    """Refuse validation sets of what the parameters were trained on; say so where nobody can know.

    Args:
      known: what that is.
      asked, now: the data section of the run that begins with them, or of an evaluation, and what it trains on.
      where: what was saved, for the message.

    Raises:
      ConfigError: names the key and the file.
    """
    for before, after in itertools.product(known, now):
        contents = _contents(before.files)
        shared = [file["name"] for file in _data(after.files) if _content(file) in contents]
        if after.validation_fraction and shared and not is_kept_out(before, after):
            raise ConfigError(_refusal(before, after, shared[0], where=where))
    check_named_sets(known, asked, where=where)
    for after in now:
        _say_changed(known, after, where=where)


def _refusal(before: Trained, now: Trained, file: str, *, where: str) -> str:
    """What is said where parts of a file would be held out that may have been trained on."""
    wrong = f"{where} was trained on {file}, also on parts of it that may be held out now"
    other = "set it to 0 and name other files in data.validation"
    if before.source != now.source:
        change = f"data.source was {before.source} then, which holds out others than {now.source}"
        return f"data.validation_fraction={now.validation_fraction}: {wrong}: {change}; {other}"
    if before.validation_fraction != now.validation_fraction:
        change = f"data.validation_fraction: saved {before.validation_fraction}, asked {now.validation_fraction}"
        return f"{change}: {wrong}; hold out the same share of the same files, or {other}"
    share = f"data.validation_fraction={now.validation_fraction}"
    if _selects_another(before, now):
        change = f"{before.selects} then and {now.selects} now hold out other records"
        return f"{share}: {wrong}: {change}; read the same text of each record, or {other}"
    # All of it is the same: other files, or other names of them, decide what is held out.
    return f"{share}: {wrong}, because other files are read; name the same files under the same names, or {other}"


def check_named_sets(known: Sequence[Trained], asked: DataSection, *, where: str) -> None:
    """The part of check_validation that looks at the sets of data.validation."""
    contents = {content for before in known for content in _contents(before.files)}
    for name, patterns in asked.validation.items():
        if name.startswith(TRAINING_SET) or not contents:
            continue
        paths = find_files(f"data.validation.{name}", patterns)
        for path, file in zip(paths, identities(paths), strict=True):
            if (file.size, file.digest) in contents:
                right = f"leave it out, or name the set for what it is, data.validation.{TRAINING_SET}_{name}"
                raise ConfigError(f"data.validation.{name}: {where} was trained on {path}; {right}")


def is_all_kept_out(known: Sequence[Trained], now: Sequence[Trained]) -> bool:
    """Whether all that is held out now was held out when the source of the same name was last trained on."""
    last = {one.name: one for one in known}
    return all(one.name in last and is_kept_out(last[one.name], one) for one in now)


def is_kept_out(before: Trained, now: Trained) -> bool:
    """Whether all that is held out of shared files now was held out then.

    What is held out has a hash below the fraction: of the document, in whole files or in blocks of them, or of the name
    and the place of a block of a token file, or of the name of a file of the standard library. A file of text that was
    changed has other documents, of mostly the same text. Where the hash alone does not decide, all files do.
    """
    if before.source != now.source or now.validation_fraction > before.validation_fraction:
        return False
    if _selects_another(before, now):
        return False
    names = {file["name"]: _content(file) for file in _data(before.files)}
    contents = _contents(before.files)
    if now.source != "text" and any(
        _content(file) in contents and file["name"] not in names for file in _data(now.files)
    ):
        return False
    if now.source == "stdlib":
        return True
    if any(names.get(file["name"], _content(file)) != _content(file) for file in _data(now.files)):
        return False
    if contents != _contents(now.files) and not (before.is_split_by_hash and now.is_split_by_hash):
        return False
    return now.source == "tokens" or _holds_whole_files_out(before) == _holds_whole_files_out(now)


def _selects_another(before: Trained, now: Trained) -> bool:
    """Whether another part of each record is its text, so that other records are held out; False where unknown."""
    return None not in (before.selects, now.selects) and before.selects != now.selects


def _holds_whole_files_out(trained: Trained) -> bool:
    return holds_whole_files_out(len(_data(trained.files)), trained.validation_fraction)


def _say_changed(known: Sequence[Trained], now: Trained, *, where: str) -> None:
    """Say so where a file of another content has the name of one that was trained on: it may be the same one, edited.

    Nobody can know. A file of the standard library is held out by its name.
    """
    if not now.validation_fraction or now.source == "stdlib":
        return
    for before in known:
        contents = {file["name"]: _content(file) for file in _data(before.files)}
        for file in _data(now.files):
            if contents.get(file["name"], _content(file)) != _content(file):
                other = f"{where} was trained on another {file['name']}"
                edited = "if this is the same text, edited, its validation holds what was trained on"
                say(f"note: {other}; {edited}", file=sys.stderr)
                return


def _check_tokenizer_file(saved: DataSection, asked: DataSection, now: Sequence[Trained], *, where: str) -> None:
    """Of a checkpoint without identities: `check_tokenizer` with the file that its configuration names, if it is there.

    Where the configuration names none, it may be that nobody said so: it is the default.
    """
    if not saved.has_tokenizer_file:
        return
    try:
        before = _tokenizer_alone(saved)
    except DataError:
        say(f"note: {where} names the tokenizer {saved.tokenizer}, which is not there to compare", file=sys.stderr)
        return
    check_tokenizer(before, asked, now, where=where)


def _says_tokenizer(trained: Trained) -> bool:
    return trained.tokenizer is not None or _names_tokenizer(trained)


def _names_tokenizer(trained: Trained) -> bool:
    """The tokenizer of bytes is no file, so that token files without one do not say which theirs is."""
    return trained.source != "tokens" or _content_of_tokenizer(trained.files) is not None


def _may_be_of_one_tokenizer(before: Trained, after: Trained) -> bool:
    """Whether nothing shows that the ids of two mean other things. Both say their tokenizer, maybe in other ways."""
    fingerprints = _fingerprint(before), _fingerprint(after)
    if None not in fingerprints:
        return fingerprints[0] == fingerprints[1]
    contents = _content_of_tokenizer(before.files), _content_of_tokenizer(after.files)
    return BYTES not in fingerprints and (None in contents or contents[0] == contents[1])


def _fingerprint(trained: Trained) -> str | None:
    """Of its tokenizer. Where a version saved it that kept the file's identity alone: of a large file it is unknown."""
    if trained.tokenizer is not None or not _names_tokenizer(trained):
        return trained.tokenizer
    content = _content_of_tokenizer(trained.files)
    if content is None:
        return BYTES
    size, digest = content
    return digest if size <= WHOLE_BYTES else None


def _data(files: Files) -> list[dict[str, Any]]:
    return [file for file in files if file["name"] != TOKENIZER_FILE]


def _content(file: dict[str, Any]) -> tuple[int, str]:
    return file["size"], file["digest"]


def _contents(files: Files) -> set[tuple[int, str]]:
    """Of all files of data that hold anything: empty ones are the same, and have nothing to train on."""
    return {_content(file) for file in _data(files) if file["size"]}


def _content_of_tokenizer(files: Files) -> tuple[int, str] | None:
    return next((_content(file) for file in files if file["name"] == TOKENIZER_FILE), None)
