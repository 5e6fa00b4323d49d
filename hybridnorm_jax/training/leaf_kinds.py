"""What a tree of arrays is made of: the path, dtype and shape of every leaf, whether it holds numbers or not."""

from typing import Any, NamedTuple

import jax
import numpy as np


class Difference(NamedTuple):
    """A leaf that is in two trees with another dtype or shape, or in one of them only.

    Attributes:
      path: with "/" between its parts.
      found, needed: such as "float32[4, 8]"; "nothing" where there is no such leaf.
    """

    path: str
    found: str
    needed: str


def first_difference(found: Any, needed: Any) -> Difference | None:
    """The first leaf, by path, in which the tree `found` is another than `needed`; None: there is none."""
    ours, expected = _kinds(found), _kinds(needed)
    for path in sorted(ours.keys() | expected.keys()):
        difference = Difference(path, ours.get(path, "nothing"), expected.get(path, "nothing"))
        if difference.found != difference.needed:
            return difference
    return None


def _kinds(tree: Any) -> dict[str, str]:
    """Paths do not tell attributes from keys, since Orbax stores both as keys."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
