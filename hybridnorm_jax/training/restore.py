"""The model of a run, from what it left on disk."""

from typing import Any

import jax

from hybridnorm_jax.config_files import from_yaml
from hybridnorm_jax.run_config import RunConfig
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.state import init_params


def load_run(path: str, *, allow_fallback: bool = False) -> tuple[RunConfig, Any, int]:
    """(configuration, parameters on the first device, step) of a run's newest checkpoint, or of the one named.

    `Decoder(config.model).apply({"params": params}, tokens)` gives its logits.

    Args:
      path: a run's directory, or one checkpoint's such as runs/quickstart/checkpoints/000500.
      allow_fallback: where a run's newest checkpoint is damaged, use the one before it, and say so. Never of one named.

    Raises:
      UserError: no complete checkpoint there, or a damaged one.
    """
    directory, step = find_checkpoint(path)
    with Checkpoints(directory, keep=1) as checkpoints:
        step = checkpoints.usable(allow_fallback=allow_fallback) if step is None else step
        config = from_yaml(checkpoints.read_config(step))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        return config, checkpoints.restore_params(abstract, step), step
