"""The permutation of grain.experimental.index_shuffle, of one place or of many at once.

Grain computes one place at a time, in 3 to 10 µs, and so order.py finds the rows of a batch. To count what millions of
rows hold takes 0.02 to 0.1 µs a place here. Of up to 65,536 places Grain needs longer, the longer the fewer there are:
9 ms a place of ten. Here all of them take 1 to 4 ms together. A test compares the two.

They differ for 4^8 + 1, 4^9 + 1, ... places. Grain's cipher has too few bits for them: its last place gets what place 0
gets, and nothing is put last. Here one place more is permuted, and whoever is put there is permuted again.

A place is encrypted by a block cipher with as many bits as places need: Simon (Beaulieu et al. 2013, IACR eprint
2013/404), with as many rounds as asked. Where the result is no place, it is encrypted again until it is one (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The keys of the rounds are the numbers of C++'s std::seed_seq.
"""

import functools
from collections.abc import Callable

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int, UInt16

# So few places Grain computes sooner.
FEW = 8
# Half a block has at least so many bits.
LEAST_BITS = 8
LEAST_BLOCK = 1 << 2 * LEAST_BITS
# Of halves with up to so many bits a round is looked up in a table.
TABLE_BITS = 16
_WORD = 0xFFFFFFFF

Places = Int[np.ndarray, " places"]


def permuted(places: Places, *, count: int, seed: int, rounds: int) -> Places:
    """Where every place is put; no two of 0 to count - 1 are put in the same one.

    Args:
      places: from 0 to count - 1.
      count: at most 2^62.
      seed: of 32 bits.
      rounds: of the cipher, an even number from 4 on.
    """
    last = count - 1
    if last == 0:
        return np.zeros_like(places)
    if last < LEAST_BLOCK:
        return _whole(last, seed, rounds)[places].astype(np.int64)
    bits = -(-(_highest(last) - 1).bit_length() // 2)  # of half a block
    found, outside = places.copy(), np.arange(len(places))
    while len(outside) > FEW:
        again = _encrypted(found[outside], bits, seed, rounds)
        found[outside] = again
        outside = outside[again > last]
    found[outside] = [_by_grain(place, last, seed, rounds) for place in places[outside].tolist()]
    return found


def permuted_place(place: int, *, count: int, seed: int, rounds: int) -> int:
    """`permuted` of one place. Grain needs 10 ms and more for one of a few places."""
    last = count - 1
    if 0 < last < LEAST_BLOCK:
        return int(_whole(last, seed, rounds)[place])
    return _by_grain(place, last, seed, rounds)


def _by_grain(place: int, last: int, seed: int, rounds: int) -> int:
    found = index_shuffle(place, max_index=_highest(last), seed=seed, rounds=rounds)
    # Only one place is put behind the last one, and it is not the one that is behind it.
    return found if found <= last else index_shuffle(found, max_index=_highest(last), seed=seed, rounds=rounds)


def _highest(last: int) -> int:
    """The last place that Grain is asked to permute: where `last` is 4^8, 4^9, ..., one more."""
    is_power_of_4 = last.bit_count() == 1 and last.bit_length() % 2 == 1
    return last + 1 if last >= LEAST_BLOCK and is_power_of_4 else last


@functools.lru_cache(maxsize=512)
def _whole(last: int, seed: int, rounds: int) -> UInt16[np.ndarray, " places"]:
    """The permutation of all places up to `last`, which fit the smallest block.

    Of few places almost every result is none. So all numbers take two steps at once, then four, and so on. All of
    this takes 1 to 4 ms, and what is kept up to 64 MB.
    """
    found = _encrypted(np.arange(LEAST_BLOCK), LEAST_BITS, seed, rounds).astype(np.uint16)
    while (found[: last + 1] > last).any():
        found = np.where(found > last, found[found], found)
    return found[: last + 1].copy()


def _encrypted(places: Places, bits: int, seed: int, rounds: int) -> Places:
    """Simon of blocks of two halves, each with so many bits. A round mixes one half into the other."""
    mask, dtype = (1 << bits) - 1, np.uint16 if bits <= TABLE_BITS else np.int64
    left, right = ((places >> bits) & mask).astype(dtype), (places & mask).astype(dtype)
    mixers = _mixers(bits, seed, rounds)
    for first, second in zip(mixers[::2], mixers[1::2], strict=True):
        left = left ^ first(right)
        right = right ^ second(left)
    return (left.astype(np.int64) << bits) | right


@functools.lru_cache(maxsize=16)
def _mixers(bits: int, seed: int, rounds: int) -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
    """For each round: one half of a block -> what is mixed into the other."""
    keys = round_keys(seed, rounds)
    if bits > TABLE_BITS:
        return tuple(functools.partial(_mixed, bits=bits, key=key) for key in keys)
    words = np.arange(1 << bits)
    return tuple(_mixed(words, bits=bits, key=key).astype(np.uint16).take for key in keys)


def _mixed(x: Int[np.ndarray, " words"], *, bits: int, key: int) -> Int[np.ndarray, " words"]:
    """(x turned left by 1) & (x turned left by 8) ^ (x turned left by 2) ^ key, of so many bits."""
    by_1, by_8, by_2 = ((x << turn) | (x >> (bits - turn)) for turn in (1, 8, 2))
    return ((by_1 & by_8) ^ by_2 ^ key) & ((1 << bits) - 1)


def round_keys(seed: int, rounds: int) -> tuple[int, ...]:
    """The first `rounds` numbers of std::seed_seq{seed} (ISO C++, [rand.util.seedseq]); at least 4, at most 622."""
    shifts = ((68, 7), (39, 5), (7, 3))
    shift = next((shift for least, shift in shifts if rounds >= least), (rounds - 1) // 2)
    near = (rounds - shift) // 2
    far = near + shift
    words = [0x8B8B8B8B] * rounds
    for step in range(rounds):
        mixed = _scrambled(words[step] ^ words[(step + near) % rounds] ^ words[step - 1], 1664525)
        added = (mixed + (1 if step == 0 else step + (seed if step == 1 else 0))) & _WORD
        words[(step + near) % rounds] = (words[(step + near) % rounds] + mixed) & _WORD
        words[(step + far) % rounds] = (words[(step + far) % rounds] + added) & _WORD
        words[step] = added
    for step in range(rounds):
        mixed = _scrambled(words[step] + words[(step + near) % rounds] + words[step - 1], 1566083941)
        less = (mixed - step) & _WORD
        words[(step + near) % rounds] ^= mixed
        words[(step + far) % rounds] ^= less
        words[step] = less
    return tuple(words)


def _scrambled(word: int, factor: int) -> int:
    word &= _WORD
    return factor * (word ^ (word >> 27)) & _WORD
