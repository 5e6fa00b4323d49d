"""Into how many microbatches a step is divided on the devices at hand."""

from typing import NamedTuple

from hybridnorm_jax.config.run_config import TrainSection


class Microbatches(NamedTuple):
    """A step is `count` microbatches of `size` sequences each, over all devices."""

    count: int
    size: int


def microbatches_of(train: TrainSection, parts: int) -> Microbatches:
    """As few as train.grad_accumulation and train.max_device_sequences allow; the step has the same sequences always.

    Args:
      parts: into how many the mesh splits a batch. Where it cannot split one of train.grad_accumulation, that many are
        returned, and fit_checks.check_batch refuses them.
    """
    batch, count, most = train.batch_size, train.grad_accumulation, train.max_device_sequences
    device, left_over = divmod(batch, parts)
    if most is not None and not left_over and batch // count % parts == 0:
        # One sequence at a time is always allowed.
        fewest = max(count, -(-device // most))
        count = next(number for number in range(fewest, device + 1) if device % number == 0)
    return Microbatches(count=count, size=batch // count)
