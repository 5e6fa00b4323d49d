"""Evaluate a run: python eval.py RUN_DIR [key=value ...] [--json]."""

import sys

from hybridnorm_jax.command_line import run_eval

if __name__ == "__main__":
    sys.exit(run_eval(sys.argv[1:]))
