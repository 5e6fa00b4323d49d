"""What computes by hand inside the model: a function of one device's share of arrays."""

from collections.abc import Callable
from typing import Any

import jax


def on_each_device(local: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`local` on every device of the mesh in force, each with its share of the arrays; without a mesh `local` itself.

    Args:
      local: shares of arrays -> shares of results.
      in_specs, out_specs: trees of PartitionSpecs, how arrays and results are split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return local
    # check_vma: kernels, and loops with a gradient of their own, do not say over which axes their results vary.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
