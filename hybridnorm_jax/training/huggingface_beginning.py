"""A run that begins with the parameters of a Hugging Face directory."""

import os
from pathlib import Path
from typing import Any

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import present, spelled
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.interop.architectures import mathematics
from hybridnorm_jax.interop.huggingface import huggingface_config, load_huggingface
from hybridnorm_jax.interop.safetensors_files import CONFIG
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.whole_files import expanded, is_local


def is_huggingface(path: str) -> bool:
    """Whether a path that init_from names is a Hugging Face directory: one with a config.json."""
    return is_local(path) and os.path.lexists(Path(expanded(path)) / CONFIG)


def huggingface_params(config: RunConfig, program: Program) -> Any:
    """The parameters of the directory that config.init_from names, where the program wants them.

    Raises:
      UserError: the directory is damaged, or holds another model than that of the run; or the optimizer's state is
        wanted, which no such directory holds.
    """
    path = present(config.init_from)
    if config.init_optimizer:
        right = "start without it, or from a run"
        raise ConfigError(f"init_optimizer=true: {path} is a Hugging Face directory, without an optimizer; {right}")
    _check_same_model(path, huggingface_config(path), config.model)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    return load_huggingface(path, dtype=config.model.param_dtype, shardings=places)[1]


def _check_same_model(path: str, found: ModelConfig, asked: ModelConfig) -> None:
    """Raise ConfigError unless both compute the same."""
    theirs, ours = mathematics(found), mathematics(asked)
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if not differing:
        return
    # One scheme places other norms in models of other sizes: then its name is the same, and a size is what differs.
    key = next((key for key in differing if getattr(found, key) != getattr(asked, key)), differing[0])
    wrong = f"model.{key}: {path} has {spelled(getattr(found, key))}, asked {spelled(getattr(asked, key))}"
    right = "ask for the model that it is"
    raise ConfigError(f"init_from={path}: its parameters belong to another model ({wrong}); {right}")
