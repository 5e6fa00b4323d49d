"""Limits of keys of several sections."""

# A model of 10^12 parameters trained on 10^14 tokens stays a factor of ten below each.
MOST_STEPS = 1_000_000_000
MOST_SEQUENCES = 1_048_576
LONGEST_SEQUENCE = 16_777_216
MOST_TOKENS_PER_STEP = 2**31
MOST_DEVICES = 1_000_000
LARGEST_WEIGHT = 1_000_000
LARGEST_RATE = 1000
# A 32-bit number below it is as good as zero.
SMALLEST = 1e-30
LARGEST_SEED = 2**32 - 1
# Linux allows 255; the names of a run's temporary files are longer than its own.
LONGEST_NAME = 200
