"""`python -m hybridnorm_jax [SCHEME ...] [LAYERS]`: print schemes as tables (all of them, 4 layers deep)."""

import sys

from hybridnorm_jax.placement import SCHEMES


def main(words: list[str]) -> None:
    """Print the named schemes at the depth given last."""
    num_layers = int(words.pop()) if words and words[-1].isdigit() else 4
    unknown = [word for word in words if word not in SCHEMES]
    if unknown:
        sys.exit(f"no scheme {', '.join(unknown)}; there are: {', '.join(sorted(SCHEMES))}")
    if num_layers < 1:
        sys.exit("LAYERS must be at least 1")
    print("\n\n".join(SCHEMES[name].table(num_layers) for name in words or SCHEMES))


if __name__ == "__main__":
    main(sys.argv[1:])
