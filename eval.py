"""Evaluate a run: `python eval.py ...` is `hybridnorm eval ...`."""

import sys

from hybridnorm_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
