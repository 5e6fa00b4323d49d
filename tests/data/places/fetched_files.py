"""For tests of remote files: their content, what a cache has of them, and the one line of what is refused."""

import os

import numpy as np
import pytest

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.places.remote_file import readable

MIB = 1 << 20


def content_of(place) -> bytes:
    with open(readable(place), "rb") as stream:
        return stream.read()


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(copies) -> list[str]:
    """The folders of copies, whole or not."""
    return [name for name in os.listdir(copies._folder()) if name not in ("locks", "owners")]
