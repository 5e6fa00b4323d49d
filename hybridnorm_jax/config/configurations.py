"""The configurations that come with the package, by name: `quickstart` is configs/quickstart.yaml."""

from pathlib import Path

from hybridnorm_jax.errors import ConfigError, did_you_mean

# In a checkout a link to the configs/ at its root; in a wheel the files themselves.
DIRECTORY = Path(__file__).resolve().parents[1] / "configs"


def names() -> list[str]:
    """The names, in alphabetical order."""
    return sorted(file.stem for file in DIRECTORY.glob("*.yaml"))


def find(word: str) -> Path:
    """The YAML file that a word on the command line means.

    A word that ends in .yaml or .yml, or holds a slash, is a path; any other is a configuration's name.

    Raises:
      ConfigError: there is no configuration of this name; or a file here has the same one.
    """
    if word.endswith((".yaml", ".yml")) or "/" in word:
        return Path(word)
    if word not in names():
        raise ConfigError(f"{word}: no such configuration{did_you_mean(word, names())}; a file is named FILE.yaml")
    if Path(word).is_file():
        raise ConfigError(f"{word}: a file here, and the name of a configuration; write ./{word} for the file")
    return DIRECTORY / f"{word}.yaml"
