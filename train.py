"""Pretrain: `python train.py ...` is `hybridnorm train ...`."""

import sys

from hybridnorm_jax.commands.main import start

if __name__ == "__main__":
    sys.exit(start(["train", *sys.argv[1:]]))
