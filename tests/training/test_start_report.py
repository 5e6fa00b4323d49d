"""The lines a run begins with: what is said of a learning rate whose course is longer than the run."""

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.training.start_report import _optimizer

PIECES = "optimizer.schedule=piecewise"
TOKENS = 8 * 256  # of a step


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], ""),
        (["optimizer.warmup_steps=100"], ""),  # the last step has the peak
        (["optimizer.warmup_steps=101"], "; note: the run ends within the warm-up of 101 steps"),
        (
            ["optimizer.warmup_steps=0", f"optimizer.warmup_tokens={100 * TOKENS + 1}"],
            "; note: the run ends within the warm-up of 101 steps",
        ),
        ([PIECES, "optimizer.piecewise={50: 0.3, 99: 0.1}"], ""),
        (
            [PIECES, "optimizer.piecewise={300: 0.1, 50: 0.3, 100: 0.2}"],
            "; note: the run ends before the change after 100 steps",
        ),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule_says_so(keys, said):
    config = parse(["quickstart", "train.steps=100", "train.batch_size=8", "train.seq_len=256", *keys])
    line = _optimizer(config)
    assert line.partition("; ")[0].endswith(
        f"learning rate {config.optimizer.learning_rate:g}, {config.optimizer.schedule}"
    )
    assert line.endswith(f"{config.optimizer.schedule}{said}")
