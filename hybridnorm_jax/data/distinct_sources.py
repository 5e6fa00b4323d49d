"""Whether the sources of a mixture have a file in common: its weight would be another than what the mixture says."""

import os
from collections.abc import Mapping, Sequence

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.files.identity import FileIdentity
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import is_local

# Two files of this many bytes with the same content are one that was copied.
SMALL = 1 << 14


def check_paths(sections: Mapping[str, DataSection]) -> None:
    """Refuse a file that two sources name, through whatever links.

    Args:
      sections: of the sources, by name.

    Raises:
      DataError: names the file and both sources; or a file is not there.
    """
    owners: dict[str, str] = {}
    for name, section in sections.items():
        if section.source == "stdlib":
            _claim(owners, "the standard library", name, "the standard library")
            continue
        for path in find_files(f"data.mixture.{name}.files", section.files):
            text = os.fspath(path)
            _claim(owners, os.path.realpath(text) if is_local(text) else text, name, text)


def check_contents(files: Mapping[str, Sequence[FileIdentity]]) -> None:
    """Refuse a file whose size and sampled content are those of a file of another source.

    Small files, such as licenses, may well be in several sources.

    Args:
      files: of the sources, by name.

    Raises:
      DataError: names the file and both sources.
    """
    owners: dict[str, str] = {}
    for name, identities in files.items():
        for file in identities:
            if file.size >= SMALL:
                _claim(owners, f"{file.size} {file.digest}", name, file.name)


def _claim(owners: dict[str, str], content: str, name: str, shown: str) -> None:
    owner = owners.setdefault(content, name)
    if owner != name:
        wrong = f"{shown} is read by data.mixture.{owner} too, so its weight would be another than either says"
        raise DataError(f"data.mixture.{name}.files: {wrong}; leave it out of one of them")
