"""Whether raw numbers are what data.token_dtype says, told from samples of them.

Each rule is one that token ids break: the chance that ids which only happen to look like something else are refused is
below CHANCE. Where nothing is certain the numbers are read as they are named: single bytes that are spread evenly, for
example, look like the ids of a vocabulary of 65,536. A file that np.save has written is never looked at.
"""

import math
from typing import BinaryIO

import numpy as np

CHANCE = 1e-12
SAMPLES = 16
SAMPLE_BYTES = 4096
FEWEST_SAMPLED = 16
# Upper halves of the ids of the largest vocabularies: below a million.
LARGEST_HIGH_HALF = 15
# Of ids below 2^20 that are stored as floats the last bits are 0 and the exponents few: of pairs of 16-bit ids that is
# so in less than 1 of 1,000. So many different ones are certain.
FEWEST_FLOATS = math.ceil(math.log(CHANCE) / math.log(1e-3))
# Other floats: between 2^-30 and 2^30, which are 61 of 256 exponents. The lower 16 bits are spread evenly.
FLOAT_EXPONENTS = (127 - 30, 127 + 30)
FEWEST_OTHER_FLOATS = 1000
# Two distributions of bytes are the same, or even, if they differ by less, as total variation: half the sum of |p - q|.
SAME = 0.15
EVEN = 0.25
# Fewer different ids may have equal upper and lower bytes by chance, such as 0 and 257.
FEWEST_IDS = 16


def other_numbers(stream: BinaryIO, size: int, dtype: np.dtype) -> tuple[str, str] | None:
    """What sampled numbers are if not `dtype`, and what is right: None where they may be what they should be.

    Args:
      stream: the file.
      size: its bytes.
      dtype: uint16 or uint32.
    """
    groups = sample(stream, size)
    little, big = groups.view("<u2"), groups[:, ::-1].copy().view("<u2")
    if little.size < FEWEST_SAMPLED:
        return None
    if floats := _floats(groups):
        return f"its numbers look like {floats}, not {dtype}", "write uint16 or uint32"
    swapped = "with the byte order of other machines (big-endian)"
    for words, order in ((little, ""), (big, f" {swapped}")):
        if _are_64_bit(words):
            return f"its numbers look like 64-bit ones{order}, not {dtype}", "write uint16 or uint32"
    if dtype.itemsize == 2 and _are_32_bit(little):
        wrong = "read as uint16, every second token is 0 or tiny: its numbers look like 32-bit ones"
        return wrong, "set data.token_dtype=uint32"
    if _are_32_bit(big) and (big[:, ::2] != 0).mean() > 0.5 and not _are_32_bit(little):
        return f"its numbers look like 32-bit ones {swapped}", "write them with np.save"
    if dtype.itemsize == 4 and (little[:, 1::2] > 255).mean() <= 0.5:
        return None
    if _are_swapped(groups):
        return f"its numbers look like 16-bit ones {swapped}", "write them with np.save"
    if _are_bytes(groups):
        wrong = f"both bytes of its numbers look the same: single bytes (uint8) or another format, not {dtype}"
        return wrong, "write ids as uint16 or uint32"
    if dtype.itemsize == 4:
        wrong = "read as uint32, most tokens are above 16 million: its numbers look like 16-bit ones"
        return wrong, "set data.token_dtype=uint16"
    return None


def sample(stream: BinaryIO, size: int) -> np.ndarray:
    """Bytes (groups, 8) of stretches spread evenly over the file, each from a multiple of 8 bytes on, none twice."""
    starts = np.arange(0, size, SAMPLE_BYTES)
    if len(starts) > SAMPLES:
        starts = np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64) // 8 * 8
    pieces = [np.empty(0, np.uint8)]
    for start in starts.tolist():
        stream.seek(start)
        piece = stream.read(SAMPLE_BYTES)
        pieces.append(np.frombuffer(piece[: len(piece) // 8 * 8], np.uint8))
    return np.concatenate(pieces).reshape(-1, 8)


def _are_64_bit(words: np.ndarray) -> bool:
    """Whether of 64-bit ids, as four 16-bit words, the two upper words are 0 and the second is tiny."""
    wide = not words[:, 2:].any() and words[:, 0].any() and words[:, 1].max() <= LARGEST_HIGH_HALF
    return bool(wide and (words[:, 0] != 0).mean() > 0.5)


def _are_32_bit(words: np.ndarray) -> bool:
    """Whether the upper halves of 32-bit ids are tiny, and the lower ones are not."""
    upper, lower = words[:, 1::2], words[:, ::2]
    return bool(upper.max() <= LARGEST_HIGH_HALF < lower.max() or (not upper.any() and (lower != 0).mean() > 0.5))


def _floats(groups: np.ndarray) -> str | None:
    """The dtype of floats that the bytes are: ids that were stored as floats, or any of usual size."""
    for dtype in (np.float32, np.float64):
        values = groups.view(dtype)
        with np.errstate(invalid="ignore"):
            whole = bool(((values >= 0) & (values < 2**20) & (values == np.floor(values))).all())
        if whole and len(np.unique(values[values > 0])) >= FEWEST_FLOATS:
            return np.dtype(dtype).name
    words = groups.view("<u2")
    lower, upper = words[:, ::2], words[:, 1::2]
    exponents = upper >> 7 & 0xFF
    usual = (exponents >= FLOAT_EXPONENTS[0]) & (exponents <= FLOAT_EXPONENTS[1])
    if lower.size >= FEWEST_OTHER_FLOATS and (usual | (upper == 0) & (lower == 0)).all():
        is_even = _difference(_shares(lower >> 12, 16), np.full(16, 1 / 16)) < SAME
        return "float32" if is_even else None
    return None


def _are_swapped(groups: np.ndarray) -> bool:
    """Whether 16-bit ids have their upper byte first.

    As they are read, the lower bytes then reach only as far as the true ids, M, and the upper bytes, which truly are
    the lower ones, to 255. Of true ids no lower byte above M has the chance ((M + 1) / 256)^k, where k is the number of
    different upper bytes: ids that share one may be neighbours. So this is seen up to a vocabulary of 58,000.
    """
    lower, upper = groups[:, ::2], np.unique(groups[:, 1::2])
    most = int(lower.max())
    above = (upper > most).mean()
    return most < 255 and above > (255 - most) / 512 and ((most + 1) / 256) ** len(upper) < CHANCE


def _are_bytes(groups: np.ndarray) -> bool:
    """Whether upper and lower bytes have the same distribution, and not an even one.

    Of ids they differ: the upper bytes of a vocabulary of 50,000 end at 195, and usual ids are small.
    """
    lower, upper = _shares(groups[:, ::2], 256), _shares(groups[:, 1::2], 256)
    both = (lower + upper) / 2
    # Expected of two samples of one distribution.
    noise = np.sqrt(both * (1 - both) / (math.pi * groups.size / 2)).sum()
    if 2 * noise > SAME or len(np.unique(groups.view("<u2"))) < FEWEST_IDS:
        return False
    return _difference(lower, upper) < 2 * noise and _difference(both, np.full(256, 1 / 256)) > EVEN


def _shares(values: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(values.ravel(), minlength=count) / values.size


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum() / 2)
