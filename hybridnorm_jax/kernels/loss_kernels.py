"""What computes the loss from what the head reads: whether the kernel that is asked for can."""

from typing import Any

import jax.numpy as jnp

from hybridnorm_jax.config_fields import check, check_choice
from hybridnorm_jax.kernels.backend_names import LOSS_KERNELS


def check_loss_kernel(
    name: str,
    *,
    platform: str,
    dtype: Any,
    width: int,
    capped: bool,
    more_than_table: str | None,
    split_by: tuple[str, ...],
) -> None:
    """Raise ConfigError where train.loss_kernel cannot compute this on the devices of the mesh in force.

    Args:
      platform: of the devices.
      dtype, width: of what the head reads.
      capped: there is a model.logit_cap.
      more_than_table: `key=value` of what gives the head parameters besides its table; None where it has no others.
      split_by: the mesh axes that split the vocabulary.
    """
    check_choice("train.loss_kernel", name, LOSS_KERNELS)
    if name == "xla":
        return
    reason = None
    if platform != "tpu":
        reason = f"needs platform tpu, this is {platform}"
    elif jnp.dtype(dtype).name not in ("bfloat16", "float32"):
        reason = f"needs model.dtype bfloat16 or float32, not {jnp.dtype(dtype).name}"
    elif more_than_table is not None:
        reason = f"has no parameters of the head besides its table, which {more_than_table} needs"
    elif split_by:
        reason = f"needs the whole vocabulary on every device, and mesh axis {' x '.join(split_by)} splits it"
    else:
        from hybridnorm_jax.kernels.tpu_head import LANES, token_block  # imports Pallas, which takes a while

        if not token_block(LANES, width, dtype, capped=capped):
            reason = f"does not fit into the memory of a core of this TPU with model.d_model={width}"
    check(reason is None, "train.loss_kernel", name, f"{reason}; use xla")
