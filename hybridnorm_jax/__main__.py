"""`python -m hybridnorm_jax COMMAND ...` is `hybridnorm COMMAND ...`."""

import sys

from hybridnorm_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
