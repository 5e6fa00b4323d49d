"""Pretrain: `python train.py ...` is `hybridnorm train ...`."""

import sys

from hybridnorm_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
