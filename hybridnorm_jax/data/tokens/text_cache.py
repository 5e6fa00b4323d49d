"""The cache of tokenized text: one directory per fingerprint of everything that decides its content.

    <data.cache_dir>/<fingerprint>/manifest.json train-00000.npy train-00000.ends.npy validation-00000.npy ...

It is a directory as `hybridnorm tokenize` writes it (tokenized_directory.py). It is written under another name and
renamed when it is whole. So one with its final name is complete, unless somebody damaged it later. Where two processes
write the same one, the second keeps what the first has written.
"""

import hashlib
import json
import pathlib
import shutil
import sys

from etils import epath

from hybridnorm_jax.config.data_file_names import MANIFEST
from hybridnorm_jax.data.files.manifest import Manifest
from hybridnorm_jax.data.places.cache_directory import cache_root, refusals_of_cache
from hybridnorm_jax.data.places.whole_directories import whole_directory
from hybridnorm_jax.data.text.sources import Corpus
from hybridnorm_jax.data.tokens.token_workers import ThisProcess, Workers
from hybridnorm_jax.data.tokens.tokenized_directory import TokenizedDirectory
from hybridnorm_jax.data.tokens.tokenizers import Tokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import is_local

# Part of every fingerprint: raise it when the same inputs give other files than before.
FORMAT = 6


def open_text_cache(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    fraction: float,
    cache_dir: str,
    progress: bool,
    workers: Workers | None = None,
) -> TokenizedDirectory:
    """The corpus as tokens, `fraction` of its documents in the split "validation", the others in "train".

    Each document is followed by the tokenizer's separator. Tokenizes only where no cache of the same inputs exists.

    Args:
      workers: who tokenizes; None: this process.

    Raises:
      DataError: text that cannot be read, a cache directory that cannot be written.
    """
    if not is_local(cache_dir):
        raise DataError(f"data.cache_dir={cache_dir}: the cache is memory-mapped; name a local directory")
    job = Job(corpus, tokenizer, fraction)
    inputs = {"format": FORMAT, **job.inputs()}
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    root = cache_root(cache_dir, fingerprint)
    directory = root / fingerprint
    with refusals_of_cache(root):
        cache = _open(directory)
        if cache is None:
            if directory.exists():
                print(f"{directory}: damaged cache; tokenizing again", file=sys.stderr)
                shutil.rmtree(directory)
            with whole_directory(directory, is_whole=lambda: _open(directory) is not None) as partial:
                write_tokens(partial, job, workers or ThisProcess(tokenizer), shown=progress)
            cache = _open(directory)
    return cache


def _open(directory: pathlib.Path) -> TokenizedDirectory | None:
    """The cache in a directory; None where there is none, or where its files no longer have the sizes they had."""
    try:
        manifest = Manifest.parse((directory / MANIFEST).read_bytes())
        is_whole = all((directory / file.name).stat().st_size == file.size for file in manifest.files)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    places = {file.name: epath.Path(directory) / file.name for file in manifest.files}
    return TokenizedDirectory(epath.Path(directory), manifest, places) if is_whole else None
