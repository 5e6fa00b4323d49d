"""The parameters that a model will have, without any of their numbers."""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType

from hybridnorm_jax.model.build import build_model, smallest_input
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_kinds import NORM_KINDS, NormKind
from hybridnorm_jax.model.schemes import Scheme


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of build_model(config): its tree, with a jax.ShapeDtypeStruct for each array.

    Nothing is computed and no device is started. Without jax_enable_x64 float64 parameters are float32 here, as JAX
    makes them.
    """
    # What computes the model does not matter for shapes, and "auto" would ask which devices there are.
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="dense", remat="none")
    kinds = plain.norm_kind, NORM_KINDS[plain.attention_norm_kind]
    shapes = _traced(plain, (plain.scheme_rule, *kinds), jax.config.read("jax_enable_x64"))
    return jax.tree.map(lambda leaf: leaf, shapes)  # dicts of the caller's own


@functools.lru_cache(maxsize=128)
def _traced(config: ModelConfig, named: tuple[Scheme | NormKind, ...], x64: bool) -> dict[str, Any]:
    """Flax traces a forward pass for the shapes, which takes a tenth of a second; conversions ask again and again.

    Args:
      named, x64: what the result depends on besides the configuration, which only names its scheme and kinds of norms.
    """
    # Key and input are made inside, where they are traced: outside, making them would start a device. So would a
    # question for the platform; that of this mesh is unknown. Inside a step that is being traced there is a mesh
    # already, which cannot be left. Without rules no axis is sharded, whatever the mesh.
    unknown = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,)))
    traced_already = not jax.sharding.get_abstract_mesh().empty
    with contextlib.nullcontext() if traced_already else unknown, nn.logical_axis_rules(()):
        model = build_model(config)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), smallest_input(config)))
    params: dict[str, Any] = variables["params"]
    return params
