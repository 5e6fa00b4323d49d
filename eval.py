"""Evaluate a run: python eval.py RUN_DIR [key=value ...] [--json]."""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # As in train.py; there is nothing to be saved later either.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from hybridnorm_jax.command_line import run_eval

if __name__ == "__main__":
    sys.exit(run_eval(sys.argv[1:]))
