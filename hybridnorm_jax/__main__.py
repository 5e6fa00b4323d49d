"""`python -m hybridnorm_jax COMMAND ...` is `hybridnorm COMMAND ...`."""

import sys

from hybridnorm_jax.commands.main import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
