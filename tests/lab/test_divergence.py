"""Which losses count as diverged although they are finite."""

from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.run_files import Point


def _points(losses):
    """The losses of steps 1, 2, ..."""
    return [Point(step, loss) for step, loss in enumerate(losses, 1)]


def test_a_run_whose_loss_rises_for_good_has_diverged():
    falling = [5 - step / 50 for step in range(1, 101)]
    assert rising_since(_points(falling)) is None
    spike = [*falling[:39], *(loss + 3 for loss in falling[39:44]), *falling[44:]]
    assert rising_since(_points(spike)) is None
    risen = [*falling[:60], *[4.5] * 40]
    assert rising_since(_points(risen)) == 60
    slightly = [*falling[:60], *[4.2] * 40]  # 0.3 above the mean of steps 51 to 60
    assert rising_since(_points(slightly)) is None
    assert rising_since(_points([*risen, float("nan")])) == 60
    assert rising_since(_points([5.0])) is None
    spike_at_the_end = [*falling[:-1], 12.0]
    assert rising_since(_points(spike_at_the_end)) is None
