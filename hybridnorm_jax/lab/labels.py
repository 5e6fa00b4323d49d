"""In what the configurations of runs differ: what a label must name, and what makes their losses incomparable."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

from hybridnorm_jax.config.key_lookup import flatten
from hybridnorm_jax.config.resume_keys import decides_trajectory
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import spelled

# The axes of a comparison, which no label names.
AXES = ("train.seed", "optimizer.learning_rate")
# Attributes of the model that follow from others unless they are set. No label names a value that follows.
DERIVED = ("num_kv_heads", "head_dim", "mlp_dim", "attention_norm_scale", "attention_norm_bias", "init_std")
STEPS = "train.steps"
# Runs that differ in one of these keys, or in data.*, have losses over different tokens or numbers of tokens.
SAME = (STEPS, "train.batch_size", "train.seq_len", "model.vocab_size", "eval.batches", "eval.stride")
DATA_MAY_DIFFER = ("data.cache_dir", "data.read_threads")


def labels(configs: Sequence[RunConfig], unnamed: Collection[str] = ()) -> list[str]:
    """The label of each: its scheme, and the value of every key in which they differ, such as "pre, num_layers=29".

    Args:
      unnamed: keys that no label names, because they follow from what the label names.
    """
    keys = [key for key in differing(configs) if key != "model.scheme" and key not in unnamed]
    made = []
    for config in configs:
        values = settings(config)
        parts = [f"{_short(key, keys)}={spelled(values.get(key))}" for key in keys]
        made.append(", ".join([config.model.scheme, *parts]))
    return made


def settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, for every key that decides a trajectory; None for a DERIVED value that is not set."""
    values = {key: value for key, value in flatten(dataclasses.asdict(config)) if decides_trajectory(key)}
    model = config.model
    with_derived_values = dataclasses.replace(model, **dict.fromkeys(DERIVED))
    for name in DERIVED:
        if getattr(with_derived_values, name) == getattr(model, name):
            values[f"model.{name}"] = None
    return values


def differing(configs: Sequence[RunConfig]) -> list[str]:
    """The keys that decide a trajectory and in which configurations differ, without AXES."""
    first, *others = [settings(config) for config in configs]
    keys = dict.fromkeys(itertools.chain(first, *others))
    return [key for key in keys if key not in AXES and any(other.get(key) != first.get(key) for other in others)]


def measured_otherwise(one: RunConfig, other: RunConfig, may_differ: Collection[str] = ()) -> list[str]:
    """Why the losses of two configurations are not losses on the same tokens, such as "eval.batches (1 and 2)".

    Args:
      may_differ: keys that are not compared.
    """
    ours = dict(flatten(dataclasses.asdict(one)))
    theirs = dict(flatten(dataclasses.asdict(other)))
    return [
        f"{key} ({spelled(ours.get(key))} and {spelled(theirs.get(key))})"
        for key in ours | theirs  # a mixture has keys for each of its sources
        if _must_be_same(key) and key not in may_differ and ours.get(key) != theirs.get(key)
    ]


def _must_be_same(key: str) -> bool:
    return key in SAME or (key.startswith("data.") and key not in DATA_MAY_DIFFER)


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, if no other of the keys ends with it; else the key."""
    last_parts = [other.rpartition(".")[2] for other in keys]
    last = key.rpartition(".")[2]
    return last if last_parts.count(last) == 1 else key
