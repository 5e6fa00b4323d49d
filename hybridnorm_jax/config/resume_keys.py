"""Which keys may change when a run is resumed, and in which others two configurations differ."""

import dataclasses

from hybridnorm_jax.config.key_lookup import flatten
from hybridnorm_jax.config.run_config import RunConfig

# Keys that may change between two stretches of one run: they decide where it runs and what is reported, not
# which parameters it arrives at.
FREE_KEYS = {
    "data.cache_dir",
    "data.read_threads",
    "data.validation",
    "init_from",
    "model.attention",
    "model.expert_dispatch",
    "model.remat",
    "model.scan_unroll",
    "train.check_invariants",
    "train.equivalent_form",
    "train.equivalent_pad_to",
    "train.log_every",
    "train.max_bad_steps",
    "train.profile",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.stall_exit",
    "train.stall_seconds",
    "train.watch_every",
    "train.watch_sequences",
}
FREE_SECTIONS = ("run.", "mesh.", "checkpoint.", "eval.", "distributed.")


def decides_trajectory(path: str) -> bool:
    """Whether another value of this dotted key trains to other parameters."""
    return path not in FREE_KEYS and not path.startswith(FREE_SECTIONS)


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """The keys in which two configurations would train differently, such as "train.seed: saved 0, asked 1".

    Keys that may change when a run is resumed (where it runs, what it reports and saves) are left out.
    """
    pairs = zip(flatten(dataclasses.asdict(saved)), flatten(dataclasses.asdict(asked)), strict=True)
    return [
        f"{path}: saved {before!r}, asked {after!r}"
        for (path, before), (_, after) in pairs
        if before != after and decides_trajectory(path)
    ]
