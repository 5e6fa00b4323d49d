"""Which keys may change when a run is resumed, and in which others two configurations differ."""

import dataclasses
import math

from hybridnorm_jax.config.key_lookup import entry_key, flatten
from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import spelled

# Keys that may change between two stretches of one run: they decide where it runs and what is reported, not
# which parameters it arrives at.
FREE_KEYS = {
    "data.cache_dir",
    "data.cache_gib",
    "data.read_threads",
    "data.validation",
    "model.attention",
    "model.expert_dispatch",
    "model.remat",
    "model.scan_unroll",
    "train.check_invariants",
    "train.equivalent_form",
    "train.equivalent_pad_to",
    "train.log_every",
    "train.loss_kernel",
    "train.max_bad_steps",
    "train.max_device_sequences",
    "train.profile",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.stall_exit",
    "train.stall_seconds",
    "train.watch_every",
    "train.watch_sequences",
}
FREE_SECTIONS = ("run.", "mesh.", "checkpoint.", "eval.", "distributed.")
# Keys of the model under which parameters mean the same: how they were drawn, how the function is computed, and how far
# its branches have grown.
SAME_MEANING = {
    "model.base_head_dim",
    "model.base_width",
    "model.dropout",
    "model.dtype",
    "model.init_std",
    "model.initializer",
    "model.norm_alpha",
    "model.norm_shift",
    "model.param_dtype",
    "model.ramp_at",
    "model.ramp_steps",
}
STEPS = "train.steps"
# Schedules whose learning rates do not depend on the number of steps in all.
ENDLESS_SCHEDULES = ("inverse_sqrt", "piecewise", "constant")
# What is scored. A run that has ended is scored by other ones when it is started again, and keeps its own.
SCORED = ("data.validation", "eval.batches")
# Where the data are. A checkpoint holds the identities of the files, which are compared instead (run_identity.py).
PLACES_OF_DATA = ("data.files", "data.tokenizer")


# Of an entry of data.mixture: where its files are, and what only refuses a run.
PLACE_IN_ENTRY, FREE_IN_ENTRY = "files", "epochs"
MIXTURE, STAGES = "data.mixture", "data.stages"


def is_place_of_data(path: str) -> bool:
    """Whether this dotted key says where data are, and not what they are."""
    entry = entry_key(path)
    return path in PLACES_OF_DATA or (entry is not None and entry.name == PLACE_IN_ENTRY)


def decides_trajectory(path: str) -> bool:
    """Whether another value of this dotted key, or of this entry of a map, trains to other parameters."""
    entry = entry_key(path)
    if entry is not None and entry.name == FREE_IN_ENTRY:
        return False
    parts = path.split(".")
    keys = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return not keys & FREE_KEYS and not path.startswith(FREE_SECTIONS)


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """The keys in which two configurations would train differently, such as "train.seed: saved 0, asked 1".

    Keys that may change when a run is resumed (where it runs, what it reports and saves) are left out.
    """
    return list(differences_by_key(saved, asked).values())


def differences_by_key(saved: RunConfig, asked: RunConfig) -> dict[str, str]:
    """`differences`, each under its key."""
    return {path: line for path, line in _differing(saved, asked).items() if decides_trajectory(path)}


def parameter_differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """The keys that give parameters another meaning, or another shape, as `differences` writes them."""
    return [
        line
        for path, line in _differing(saved, asked).items()
        if path.startswith("model.") and decides_trajectory(path) and path not in SAME_MEANING
    ]


def scored_differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """The keys in which the scores of two configurations are not of the same tokens, as `differences` writes them."""
    return [line for path, line in _differing(saved, asked).items() if path.startswith(SCORED)]


def resume_differences(saved: RunConfig, asked: RunConfig, step: int) -> list[str]:
    """`differences`, but the data may have moved, and train.steps may be another where no step of the first `step` had
    another learning rate.
    """
    differing = fixed_differences(saved, asked, step)
    if STEPS in differing:
        obstacle = _obstacle_of_steps(saved, asked, step)
        differing[STEPS] = "" if obstacle is None else f"{differing[STEPS]}, but {obstacle}"
    return [line for line in differing.values() if line]


def fixed_differences(saved: RunConfig, asked: RunConfig, step: int) -> dict[str, str]:
    """`differences_by_key` without the places of data, and without weights of a mixture that no step has had.

    Args:
      step: how many steps were made.
    """
    differing = {path: line for path, line in differences_by_key(saved, asked).items() if not is_place_of_data(path)}
    if bool(saved.data.mixture) != bool(asked.data.mixture):
        sources = [", ".join(one.data.mixture) or "none" for one in (saved, asked)]
        differing = {path: line for path, line in differing.items() if not path.startswith((MIXTURE, STAGES))}
        return differing | {MIXTURE: f"{MIXTURE}: saved {sources[0]}, asked {sources[1]}"}
    first = _first_other_weights(saved, asked)
    if first is None or first >= step:
        new = {name for name in asked.data.mixture if name not in saved.data.mixture}
        return {path: line for path, line in differing.items() if not _is_of_weights(path, new)}
    moved = f"{STAGES}: begin at other steps, because train.steps is {asked.train.steps:,}, saved {saved.train.steps:,}"
    if not any(_is_of_weights(path, set()) for path in differing):
        differing[STAGES] = moved
    later = f"only what a source weighs after step {step:,} may change, with stages (data.stages) that begin later"
    return {
        path: f"{line}, but step {first + 1:,} was made with other weights; {later}"
        if path == STAGES or _is_of_weights(path, set())
        else line
        for path, line in differing.items()
    }


def _is_of_weights(path: str, new: set[str]) -> bool:
    """Whether a key says only how much of a source is read.

    Args:
      new: sources that were not there before: all of their keys are such.
    """
    entry = entry_key(path)
    if entry is None or entry.map != MIXTURE:
        return path == STAGES
    return entry.name == "weight" or entry.entry in new


def _first_other_weights(saved: RunConfig, asked: RunConfig) -> int | None:
    """The number of steps after which the weights of a mixture are others for the first time; None: they never are."""
    before, after = (
        {stage.step: stage.weights for stage in config.data.mixture_stages(config.train.steps)}
        for config in (saved, asked)
    )
    now_before, now_after = None, None
    for step in sorted(before | after):
        now_before, now_after = before.get(step, now_before), after.get(step, now_after)
        if now_before != now_after:
            return step
    return None


def last_step_at_any_length(config: OptimizerSection, steps: int, tokens_per_step: int) -> float:
    """The last update whose learning rate does not depend on the number of steps in all; infinity: none does."""
    warmup = warmup_steps(config, tokens_per_step)
    if config.schedule in ENDLESS_SCHEDULES:
        return math.inf
    if config.schedule == "wsd":
        return max(warmup, steps - wsd_decay_steps(config, steps, warmup))
    return warmup


def warmup_steps(config: OptimizerSection, tokens_per_step: int) -> int:
    """Updates of linear warm-up."""
    tokens = config.warmup_tokens
    return config.warmup_steps if tokens is None else math.ceil(tokens / tokens_per_step)


def wsd_decay_steps(config: OptimizerSection, steps: int, warmup: int) -> int:
    """Updates of the decay at the end of the schedule `wsd`."""
    return min(max(1, steps - warmup), max(1, round(steps * config.wsd_decay_fraction)))


def _differing(saved: RunConfig, asked: RunConfig) -> dict[str, str]:
    """Every key with another value -> what is said of it."""
    before, after = (dict(flatten(dataclasses.asdict(config))) for config in (saved, asked))
    for values in (before, after):  # one with entries is named by these
        values.pop(MIXTURE, None)
    # An encoder has keys that a decoder has not.
    return {
        path: f"{path}: saved {spelled(before.get(path))}, asked {spelled(after.get(path))}"
        for path in before | after
        if before.get(path) != after.get(path)
    }


def _obstacle_of_steps(saved: RunConfig, asked: RunConfig, step: int) -> str | None:
    """Why a run that has made `step` steps cannot have another number of steps in all, or None."""
    if asked.train.steps < step:
        return f"{step} steps are made already"
    last = min(
        last_step_at_any_length(config.optimizer, config.train.steps, config.tokens_per_step)
        for config in (saved, asked)
    )
    if step <= last:
        return None
    schedule = saved.optimizer.schedule
    wsd = "wsd before its decay"
    if schedule == "wsd":
        wsd += f", that is up to step {last}"
    endless = f"the schedules {', '.join(ENDLESS_SCHEDULES[:-1])} and {ENDLESS_SCHEDULES[-1]}"
    return (
        f"optimizer.schedule={schedule} has set the learning rates of the {step} steps made by it; "
        f"only {endless}, and {wsd}, can be trained longer"
    )
