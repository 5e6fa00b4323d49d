"""Residual layouts: which leaves of a parameter tree write the residual stream, which read it, through which norm.

A layout is data: path patterns -> roles. In a pattern `{name}` stands for a part of a path, or of one of its names,
and the role may use it again. `{a,b}` stands for either word, `*` for anything but a slash. A Pre-LN block:

    ResidualLayout({
        "block_{i}/norm_{n}/scale": NormScale(),
        "block_{i}/norm_{n}/bias": NormBias(),
        "block_{i}/attention/{query,key,value}/kernel": Reads("block_{i}/norm_1"),
        "block_{i}/attention/out/{kernel,bias}": Writes(),
        "block_{i}/up/kernel": Reads("block_{i}/norm_2"),
        "block_{i}/down/{kernel,bias}": Writes(),
    })

Every leaf must be named by exactly one rule, and every rule must name a leaf.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from hybridnorm_jax.errors import UserError


class LayoutError(UserError):
    """A residual layout that does not fit the parameter tree."""


@dataclasses.dataclass(frozen=True)
class Writes:
    """Adds to the residual stream along `axis`: embedding tables, class tokens, output projections and their biases."""

    axis: int = -1


@dataclasses.dataclass(frozen=True)
class Reads:
    """Contracts what `norm` makes of the stream along `axis`: query, key, value, FFN-in, router, head.

    Attributes:
      norm: path of the norm, its scale's and bias's path without the last part; None where the norm has no parameters
        while others have.
      axis: the contracted axis; 0 is that of a Flax (in, out) kernel. Where the norm's parameters have leading axes
        (stacked layers), the kernel has them too.
      bias: path of the bias that is added to the result; None: the leaf `bias` beside this one, if there is one. The
        rule names it too.
      input_scale: what the norm's result is multiplied with before it is read: a number, or one for each stacked layer.
    """

    norm: str | None
    axis: int = 0
    bias: str | None = None
    input_scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.input_scale, list):
            object.__setattr__(self, "input_scale", tuple(self.input_scale))


@dataclasses.dataclass(frozen=True)
class NormScale:
    """The scale of a norm, which is called by the leaf's path without the last part.

    Attributes:
      plus_one: the norm multiplies by 1 + scale.
    """

    plus_one: bool = False


@dataclasses.dataclass(frozen=True)
class NormBias:
    """The bias of a norm, as NormScale."""


@dataclasses.dataclass(frozen=True)
class Untouched:
    """Neither reads nor writes the stream: norms inside heads, biases within a branch."""


Role = Writes | Reads | NormScale | NormBias | Untouched


@dataclasses.dataclass(frozen=True)
class ResidualLayout:
    """Path patterns -> roles; see the top of this file. Hashable, so it can be a static argument of jax.jit.

    Attributes:
      rules: (pattern, role) pairs; given as a mapping or as pairs.
    """

    rules: tuple[tuple[str, Role], ...]

    def __init__(self, rules: Mapping[str, Role] | tuple[tuple[str, Role], ...]):
        object.__setattr__(self, "rules", tuple(rules.items() if isinstance(rules, Mapping) else rules))
        for pattern, role in self.rules:
            if not isinstance(role, Role):
                raise LayoutError(f"{pattern}: {role!r} is no role; Writes, Reads, NormScale, NormBias or Untouched is")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A `Reads` rule applied to one leaf: paths are of this tree, the axis is not negative, `bias` may be None."""

    norm: str | None
    axis: int
    bias: str | None
    input_scale: float | tuple[float, ...]


@dataclasses.dataclass
class Resolved:
    """A layout applied to one tree.

    Attributes:
      keys: path -> the keys it was made of.
      leaves: path -> array.
      writers: path -> axis of the stream, not negative.
      readers: path -> Reader.
      scales: norm -> path of its scale, where it has one.
      plus_one: the paths of scales that stand for 1 + scale.
      biases: norm -> path of its bias, where it has one.
      width: stored width of the stream.
    """

    keys: dict[str, tuple[Any, ...]]
    leaves: dict[str, Any]
    writers: dict[str, int] = dataclasses.field(default_factory=dict)
    readers: dict[str, Reader] = dataclasses.field(default_factory=dict)
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    plus_one: set[str] = dataclasses.field(default_factory=set)
    biases: dict[str, str] = dataclasses.field(default_factory=dict)
    width: int = 0

    @property
    def norm_leaves(self) -> list[str]:
        """The paths of all norms' scales, and then of their biases."""
        return [*self.scales.values(), *self.biases.values()]

    def tree(self, changed: Mapping[str, Any], removed: frozenset[str] = frozenset()) -> dict:
        """The tree with some leaves changed and others removed, as nested dicts of the original keys."""
        new = {self.keys[path]: changed.get(path, leaf) for path, leaf in self.leaves.items() if path not in removed}
        return unflatten_dict(new)


def resolve(layout: ResidualLayout, params: Any) -> Resolved:
    """Apply a layout to a tree of nested dicts and check that they fit. Empty dicts are dropped.

    Raises:
      LayoutError: names the first leaf or rule at fault: a leaf that no rule or two rules name, a rule that names no
        leaf (norms may be gone: they are folded first), a norm that nobody reads, widths that do not match.
    """
    if not isinstance(params, dict | FrozenDict):
        raise LayoutError(f"params: nested dicts of arrays are needed, not {type(params).__name__}")
    flat = flatten_dict(params)
    keys: dict[str, tuple[Any, ...]] = {}
    for key in flat:
        path = "/".join(map(str, key))
        if path in keys:
            raise LayoutError(f"{path}: two leaves of the tree have this path, {keys[path]} and {key}")
        keys[path] = key
    found = Resolved(keys=keys, leaves={path: _array(path, flat[key]) for path, key in keys.items()})
    _apply_rules(layout, found)
    _check(found)
    return found


def _apply_rules(layout: ResidualLayout, found: Resolved) -> None:
    """Record the role of every leaf; each must be named once."""
    named_by: dict[str, str] = {}
    for pattern, role in layout.rules:
        expression = _regex(pattern)
        matches = {path: match for path in found.leaves if (match := expression.fullmatch(path)) is not None}
        if not matches and not isinstance(role, NormScale | NormBias):
            raise LayoutError(f"{pattern}: this rule of the layout names no leaf of the tree")
        for path, match in matches.items():
            _name(named_by, path, pattern)
            bias = _enter(found, path, role, match.groupdict())
            if bias is not None:
                _name(named_by, bias, pattern)
    for path in found.leaves:
        if path not in named_by:
            raise LayoutError(f"{path}: no rule of the layout names this leaf")


def _name(named_by: dict[str, str], path: str, pattern: str) -> None:
    """Note that this rule names this leaf."""
    if path in named_by:
        raise LayoutError(f"{path}: two rules of the layout name this leaf: {named_by[path]} and {pattern}")
    named_by[path] = pattern


def _regex(pattern: str) -> re.Pattern:
    """The pattern as a regular expression; a name used twice must stand for the same text."""
    seen: set[str] = set()

    def piece(token: str) -> str:
        if token == "*":
            return "[^/]*"
        if not token.startswith("{"):
            return re.escape(token)
        words = [word.strip() for word in token[1:-1].split(",")]
        if len(words) > 1:
            return f"(?:{'|'.join(map(re.escape, words))})"
        if not words[0].isidentifier():
            raise LayoutError(f"{pattern}: {token} must hold a name, or words with commas between them")
        if words[0] in seen:
            return f"(?P={words[0]})"
        seen.add(words[0])
        return f"(?P<{words[0]}>[^/]+)"

    return re.compile("".join(piece(token) for token in re.split(r"(\{[^}]*\}|\*)", pattern)))


def _enter(found: Resolved, path: str, role: Role, captured: dict[str, str]) -> str | None:
    """Record one leaf's role; returns the path of the bias that the rule names with it."""
    ndim = found.leaves[path].ndim
    match role:
        case NormScale(plus_one=plus_one):
            found.scales[path.rpartition("/")[0]] = path
            if plus_one:
                found.plus_one.add(path)
        case NormBias():
            found.biases[path.rpartition("/")[0]] = path
        case Writes(axis=axis):
            found.writers[path] = _axis(path, axis, ndim)
        case Reads():
            named = f"{path.rpartition('/')[0]}/bias" if role.bias is None else _fill(role.bias, captured, path)
            if role.bias is not None and named not in found.leaves:
                raise LayoutError(f"{path}: its bias {named} is no leaf of the tree")
            bias = named if named in found.leaves and named != path else None
            norm = None if role.norm is None else _fill(role.norm, captured, path)
            axis = _axis(path, role.axis, ndim)
            found.readers[path] = Reader(norm=norm, axis=axis, bias=bias, input_scale=role.input_scale)
            return bias
    return None


def _fill(template: str, captured: dict[str, str], path: str) -> str:
    try:
        return template.format(**captured)
    except (KeyError, IndexError, ValueError) as error:
        raise LayoutError(f"{path}: {template} uses a name that its pattern does not have") from error


def _array(path: str, leaf: Any) -> Any:
    """The leaf, if it is an array of numbers that JAX keeps as they are."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "ndim"):
        raise LayoutError(f"{path}: a {type(leaf).__name__}, but every leaf must be an array; unbox it first")
    if dtype == jnp.float64 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise LayoutError(f"{path}: float64, which JAX keeps with JAX_ENABLE_X64=1 in the environment only")
    return leaf


def _axis(path: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise LayoutError(f"{path}: has {ndim} axes, but the layout says axis {axis}")
    return axis % ndim


def _check(found: Resolved) -> None:
    """Every norm is read, and everything is of floats and has the stream's width, which is recorded."""
    _check_norms(found)
    axes = found.writers | {path: reader.axis for path, reader in found.readers.items()}
    for path in (*axes, *found.norm_leaves):
        if not jnp.issubdtype(found.leaves[path].dtype, jnp.floating):
            raise LayoutError(f"{path}: {found.leaves[path].dtype}, but readers and writers must be floating-point")
    widths = {path: found.leaves[path].shape[axis] for path, axis in axes.items()}
    widths |= {path: found.leaves[path].shape[-1] for path in found.norm_leaves}
    first, found.width = next(iter(widths.items()))
    for path, width in widths.items():
        if width != found.width:
            shapes = f"{found.leaves[path].shape} has {width} there"
            raise LayoutError(f"{path}: {shapes}, but the stream is {found.width} wide by {first}")


def _check_norms(found: Resolved) -> None:
    """There are readers and writers, and every norm is read."""
    if not found.writers or not found.readers:
        raise LayoutError("the layout has no leaf that writes the stream, or none that reads it")
    read = {reader.norm for reader in found.readers.values()}
    norms = found.scales | found.biases
    for path, reader in found.readers.items():
        if norms and reader.norm is not None and reader.norm not in norms:
            raise LayoutError(f"{path}: reads {reader.norm}, without scale or bias in the tree; None if that is right")
    for norm, path in norms.items():
        if norm not in read:
            raise LayoutError(f"{path}: no rule of the layout says who reads {norm}")
