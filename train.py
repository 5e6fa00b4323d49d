"""Pretrain: python train.py [FILE.yaml ...] [key=value ...]; --help lists every key."""

import sys

from hybridnorm_jax.command_line import run_train

if __name__ == "__main__":
    sys.exit(run_train(sys.argv[1:]))
