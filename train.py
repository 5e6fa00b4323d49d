"""Pretrain: python train.py [FILE.yaml ...] [key=value ...]; --help lists every key."""

import os
import signal
import sys

if __name__ == "__main__":
    # Importing JAX takes seconds. Until then nothing is there to be saved: "run me again", as docs/faults.md has it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    # A KeyboardInterrupt in JAX's extensions is a traceback, an ImportError or a crash. What is ignored stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from hybridnorm_jax.command_line import run_train

if __name__ == "__main__":
    sys.exit(run_train(sys.argv[1:]))
