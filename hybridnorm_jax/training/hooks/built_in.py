"""The hooks that every run has."""

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training.hooks.evaluation import Evaluation
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.layer_watch import LayerWatch
from hybridnorm_jax.training.hooks.local_saving import LocalSaving
from hybridnorm_jax.training.hooks.metrics_lines import MetricsLines
from hybridnorm_jax.training.hooks.profile import Profile
from hybridnorm_jax.training.hooks.progress_bar import ProgressBar
from hybridnorm_jax.training.hooks.saving import Saving
from hybridnorm_jax.training.hooks.skipped_steps import SkippedSteps


def built_in_hooks(config: RunConfig) -> list[Hook]:
    """The hooks of a run, in the order in which they are called.

    A profile ends before the step is saved. A line of metrics is written before its step stops the run. A step is saved
    before it is evaluated, so that an evaluation that is cut off loses no step.
    """
    return [
        ProgressBar(),
        Profile(enabled=config.train.profile),
        LayerWatch(every=config.train.watch_every),
        MetricsLines(every=config.train.log_every),
        SkippedSteps(most_in_a_row=config.train.max_bad_steps),
        LocalSaving(every=config.checkpoint.local_every),
        Saving(every=config.checkpoint.every),
        Evaluation(every=config.eval.every),
    ]
