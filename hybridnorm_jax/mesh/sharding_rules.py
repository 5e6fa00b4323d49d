"""The mesh axes, and the one table of which logical axis lies on which of them. Data; nothing here imports JAX."""

from collections.abc import Mapping

from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import ConfigError, did_you_mean

# Outermost first: devices that differ in the last axis alone are nearest to each other.
MESH_AXES = ("replica", "data", "fsdp", "context", "expert", "tensor")

# Logical axis -> where it may lie, best first; `+` joins mesh axes that split it together. A dimension takes the first
# entry that divides it and whose axes no dimension before it has taken; without one it stays whole.
DEFAULT_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica+data+fsdp+expert",),
    "seq": ("context",),
    # Experts' kernels, whose first dimension takes "expert", are left with the second entry.
    "embed": ("fsdp+context+expert", "fsdp+context", "fsdp"),
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Logical axis -> its entries, each a tuple of mesh axes.
Rules = dict[str, tuple[tuple[str, ...], ...]]


def resolve_rules(changes: Mapping[str, tuple[str, ...]] | None = None) -> Rules:
    """DEFAULT_RULES with the entries that `changes` replaces, each as tuples of mesh axes.

    Raises:
      ConfigError: an unknown logical or mesh axis, one named twice in an entry, a batch without exactly one entry.
    """
    changes = changes or {}
    for name in changes:
        if name not in DEFAULT_RULES:
            raise ConfigError(f"mesh.rules.{name}: not a logical axis{did_you_mean(name, DEFAULT_RULES)}")
    entries_by_axis = DEFAULT_RULES | dict(changes)
    rules = {name: tuple(_entry(name, entry) for entry in entries) for name, entries in entries_by_axis.items()}
    if len(rules["batch"]) != 1:
        raise ConfigError(
            f"mesh.rules.batch={spelled(changes['batch'])}: must be one entry; a batch is always split so"
        )
    return rules


def first_entry(rules: Rules, logical_axis: str | None) -> tuple[str, ...]:
    """The mesh axes that should split a logical axis; none where no rule splits it."""
    entries = rules.get(logical_axis, ()) if logical_axis is not None else ()
    return entries[0] if entries else ()


def _entry(name: str, entry: str) -> tuple[str, ...]:
    """The mesh axes that an entry joins."""
    axes = tuple(axis.strip() for axis in entry.split("+"))
    for axis in axes:
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh.rules.{name}: {axis!r} is not a mesh axis{did_you_mean(axis, MESH_AXES)}")
    if len(set(axes)) < len(axes):
        raise ConfigError(f"mesh.rules.{name}: {entry} names an axis twice")
    return axes


RULES = resolve_rules()
