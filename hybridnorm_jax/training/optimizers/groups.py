"""Groups of parameters, which patterns of their paths name, with learning rates and weight decays of their own."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from hybridnorm_jax.errors import ConfigError, did_you_mean


def own_number(path: tuple[Any, ...], patterns: Iterable[str], numbers: Sequence[Any]) -> Any:
    """The number of the last pattern that the path of a parameter fits; None where none does.

    `*` in a pattern stands for any characters, "/" too: "*/query/kernel" names those projections in all layers.

    Args:
      numbers: of the patterns, in their order; may be traced.
    """
    name = path_text(path)
    fitting = [number for pattern, number in zip(patterns, numbers, strict=True) if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else None


def check_patterns(key: str, patterns: Iterable[str], params: Any) -> None:
    """Raise ConfigError for the first pattern that no parameter's path fits."""
    paths = [path_text(path) for path, _ in jax.tree.leaves_with_path(params)]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = {_as_pattern(path, whole_modules=pattern.endswith("/*")) for path in paths}
            raise ConfigError(f"{key}: the pattern {pattern!r} fits no parameter{did_you_mean(pattern, near)}")


def _as_pattern(path: str, *, whole_modules: bool) -> str:
    """A pattern that a path fits: of what is in blocks the last two parts, which say what it is in any layer."""
    *_, module, name = ["", *path.split("/")]
    in_block = path.startswith("run_")
    return f"{'*/' if in_block else ''}{module}/{'*' if whole_modules else name}"


def path_text(path: tuple[Any, ...]) -> str:
    """The path of a parameter as patterns name it, such as run_0/attention/query/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
