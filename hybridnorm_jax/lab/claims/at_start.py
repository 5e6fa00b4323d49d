"""Claims about signal and gradients of fresh models, measured as `hybridnorm lab signal` does."""

import functools
from collections.abc import Sequence

import numpy as np

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.lab.claims.claim import Finding
from hybridnorm_jax.lab.compare_options import DEFAULT
from hybridnorm_jax.lab.signal_at_start import Signal, measure, random_batch
from hybridnorm_jax.lab.signal_claims import BOUNDED, CHECKS

DEPTHS = (8, 32, 96)
# Of the batch of random tokens, as by default in `hybridnorm lab signal`.
SEQUENCES, SEQ_LEN = 2, 128


@functools.cache
def signal_by_depth(
    scheme: str, initializer: str, depths: Sequence[int], arguments: tuple[str, ...] = ()
) -> dict[int, Signal]:
    """What was measured of one scheme at each depth.

    Args:
      arguments: keys of the model, as they are typed; everything else is the configuration `lab`.
    """
    config = parse(arguments, DEFAULT)
    batch = random_batch(config.model.vocab_size, SEQUENCES, SEQ_LEN, config.train.seed)
    return {
        depth: measure(config.model, scheme, depth, (initializer,), batch, config.train.seed)[0] for depth in depths
    }


def checked(
    check: str,
    measured: str,
    *,
    scheme: str | None = None,
    initializer: str,
    depths: Sequence[int] = DEPTHS,
    arguments: tuple[str, ...] = (),
) -> Finding:
    """What signal_claims says.

    Args:
      check: a key of signal_claims.CHECKS.
      measured: the measure that the claim is about, such as "gradient/block".
      scheme: that is measured; None: the one that the claim is about, `check`.
      initializer: of the models; one by name, as the claims differ by it.
    """
    signals = signal_by_depth(check if scheme is None else scheme, initializer, tuple(depths), arguments)
    (claim,) = [each for each in CHECKS[check](initializer, signals) if each.measure == measured]
    return Finding(number=claim.seen, holds=claim.holds)


def stream_is_bounded(
    *, scheme: str, initializer: str, depths: Sequence[int] = DEPTHS, arguments: tuple[str, ...] = ()
) -> Finding:
    """Whether the RMS of the stream after all blocks, of all depths, lies within a factor of BOUNDED."""
    signals = signal_by_depth(scheme, initializer, tuple(depths), arguments)
    streams = np.concatenate([signal.measures["stream_rms"][1:] for signal in signals.values()])
    least, greatest = float(streams.min()), float(streams.max())
    number = f"RMS between {least:.3g} and {greatest:.3g} after all blocks at L={', '.join(map(str, depths))}"
    return Finding(number=number, holds=greatest < BOUNDED * least)


def above_baseline(
    measured: str,
    *,
    scheme: str,
    baseline: str,
    sign: int,
    depths: Sequence[int] = DEPTHS,
    arguments: tuple[str, ...] = (),
) -> Finding:
    """Whether the mean of a measure over the blocks is above (sign 1) or below (-1) the baseline's at every depth.

    Both schemes have the initializers that their authors recommend.
    """
    one, other = (signal_by_depth(each, "auto", tuple(depths), arguments) for each in (scheme, baseline))
    pairs = {depth: (block_mean(one[depth], measured), block_mean(other[depth], measured)) for depth in depths}
    listed = [f"{mean:.3g} against {against:.3g} at L={depth}" for depth, (mean, against) in pairs.items()]
    holds = all(sign * (mean - against) > 0 for mean, against in pairs.values())
    return Finding(number=f"{scheme} against {baseline}, mean of all blocks: {', '.join(listed)}", holds=holds)


def block_mean(signal: Signal, measured: str) -> float:
    """The mean of a measure over the blocks; what is measured after the embedding is left out."""
    return float(np.mean(signal.measures[measured][-signal.depth :]))
