"""Which raw numbers are refused as another kind, and that ids of every usual kind are not."""

import io

import numpy as np
import pytest

from hybridnorm_jax.data.tokens.token_numbers import other_numbers

RANDOM = np.random.default_rng(0)
COUNT = 20_000


def zipf(vocabulary):
    """Ids as they are usual: the n-th is as frequent as 1/n."""
    weights = 1 / np.arange(1, vocabulary + 1)
    return RANDOM.choice(vocabulary, COUNT, p=weights / weights.sum())


def said(ids, written, dtype):
    content = np.asarray(ids).astype(written).tobytes()
    found = other_numbers(io.BytesIO(content), len(content), np.dtype(dtype))
    return found and "; ".join(found)


EVEN = {f"even {size}": RANDOM.integers(0, size, COUNT) for size in (257, 1000, 32_000, 50_257)}
USUAL = {f"usual {size}": zipf(size) for size in (257, 1000, 32_000, 50_257)}
TEXT = np.frombuffer(b"All human beings are born free and equal in dignity and rights.\n" * 400, np.uint8)[:COUNT]
TEXTS = {"bytes of text": TEXT, "bytes of lines": np.where(TEXT == 10, 256, TEXT)}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", EVEN | USUAL)
@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("<f4", "look like float32"),
        ("<f8", "look like float64"),
        (">u4", "32-bit ones with the byte order of other machines"),
        (">u2", "16-bit ones with the byte order of other machines"),
        ("<i8", "64-bit"),
        (">i8", "64-bit ones with the byte order of other machines"),
    ],
)
def test_other_numbers_are_called_what_they_are(name, written, dtype, words):
    assert words in said((EVEN | USUAL)[name], written, dtype)


def test_the_bytes_of_text_in_the_other_byte_order_are_seen():
    assert "16-bit ones with the byte order" in said(TEXTS["bytes of lines"], ">u2", "uint16")


def test_any_floats_are_seen():
    assert "float32" in said(RANDOM.normal(size=COUNT), "<f4", "uint16")
    assert "float32" in said(0.02 * RANDOM.normal(size=COUNT), "<f4", "uint32")


@pytest.mark.parametrize("ids", [RANDOM.permutation(TEXT), zipf(256)], ids=["letters", "usual"])
def test_single_bytes_are_seen_where_they_are_not_spread_evenly(ids):
    assert "single bytes (uint8)" in said(ids, "u1", "uint16")


ODD = {
    "all of 16 bits": RANDOM.integers(0, 65_536, COUNT),
    "58,000": RANDOM.integers(0, 58_000, COUNT),
    "one id": np.full(COUNT, 14_000),
    "equal bytes": np.array([0, 257])[RANDOM.integers(0, 2, COUNT)],
    "four letters": np.frombuffer(b"ACGT", np.uint8)[RANDOM.integers(0, 4, COUNT)],
    "digits": RANDOM.integers(48, 58, COUNT),
    "100 ids from 32,000 on": RANDOM.integers(32_000, 32_100, COUNT),
    # Read as floats, all of these are between -2^30 and -2^9.
    "two codebooks after 50,257": 50_257 + RANDOM.integers(0, 1024, (COUNT // 2, 2)) + [0, 1024],
    "bytes of text that end with 50,256": np.where(TEXT == 10, 50_256, TEXT),
    "padding": np.where(np.arange(COUNT) < 5000, zipf(50_257), 0),
    "in order": np.arange(COUNT),
}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("name", EVEN | USUAL | TEXTS | ODD)
@pytest.mark.parametrize("count", [20, 300, 3000, COUNT])
def test_ids_are_never_called_something_else(name, dtype, count):
    ids = (EVEN | USUAL | TEXTS | ODD)[name].ravel()[:count]
    assert said(ids, dtype, dtype) is None
