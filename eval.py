"""Evaluate a run: `python eval.py ...` is `hybridnorm eval ...`."""

import sys

from hybridnorm_jax.commands.main import start

if __name__ == "__main__":
    sys.exit(start(["eval", *sys.argv[1:]]))
