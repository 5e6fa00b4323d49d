"""Pretrain: python train.py [FILE.yaml ...] [key=value ...]; --help lists every key."""

import os
import signal
import sys

if __name__ == "__main__":
    # Importing JAX takes seconds. Until then nothing is there to be saved: "run me again", as docs/faults.md has it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

from hybridnorm_jax.command_line import run_train

if __name__ == "__main__":
    sys.exit(run_train(sys.argv[1:]))
