"""The lengths for which programs are compiled: few, so that texts of many lengths share them."""

import math

SHORTEST = 32


def rounded_up(length: int, *, multiple: int = 1) -> int:
    """The length of the program for `length` tokens, a multiple of `multiple`.

    Where multiple is 1, that is less than length / 4 more, or than SHORTEST where that is more.
    """
    step = math.lcm(max(SHORTEST, 1 << max(length.bit_length() - 3, 0)), multiple)
    return -(-length // step) * step
