"""Single parameters of a model at its start, for tests of what they start from."""

import re

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn


def fresh_leaves(config, pattern, seed=0):
    """{path: leaf} of those parameters of a fresh decoder in whose path ("run_0/attention/out/kernel") the pattern is.

    XLA leaves out what nobody asks for: all of a model's parameters take a second to compile, one of them a tenth.
    """

    @jax.jit
    def draw(key):
        params = hn.Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if re.search(pattern, path)}

    leaves = draw(jax.random.key(seed))
    assert leaves, f"no parameter has {pattern} in its path"
    return leaves
