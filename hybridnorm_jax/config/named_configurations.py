"""The configurations that come with the package, by name: `quickstart` is configs/quickstart.yaml."""

from pathlib import Path

from hybridnorm_jax.errors import ConfigError, did_you_mean

# In a checkout a link to the configs/ at its root; in a wheel the files themselves.
DIRECTORY = Path(__file__).resolve().parents[1] / "configs"
# What runs where none is named.
DEFAULT = "quickstart"
SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The names, in alphabetical order."""
    return sorted(file.stem for file in DIRECTORY.glob("*.yaml"))


def find(argument: str) -> Path:
    """The YAML file that an argument means.

    One that ends in .yaml or .yml, or holds a slash, is a path; any other is a configuration's name.

    Raises:
      ConfigError: there is no configuration of this name; a file here has the same name; or a path leads nowhere and
        its file would have the name of a configuration.
    """
    if argument.endswith(SUFFIXES) or "/" in argument:
        return _existing(Path(argument))
    if argument not in names():
        shown = argument if argument.strip() else repr(argument)
        raise ConfigError(f"{shown}: no such configuration{did_you_mean(argument, names())}; a file is named FILE.yaml")
    if Path(argument).is_file():
        raise ConfigError(f"{argument}: a file here, and the name of a configuration; write ./{argument} for the file")
    return DIRECTORY / f"{argument}.yaml"


def _existing(path: Path) -> Path:
    """The path; what else is wrong with it is said when it is read."""
    if path.stem in names() and not path.exists():
        right = f"the configuration that comes with the package is named `{path.stem}`, without a path"
        raise ConfigError(f"{path}: no such file; {right}")
    return path
