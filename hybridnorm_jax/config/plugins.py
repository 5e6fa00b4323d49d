"""Modules and files that run.plugins names, imported before anything else is read of a configuration."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from hybridnorm_jax.errors import ConfigError


def import_plugin(plugin: str) -> None:
    """Import a module by name, or a .py file once per process."""
    try:
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            return
        path = Path(plugin).expanduser().resolve()
        # A name that follows from the path: a second import must not run the file, which would register again.
        name = f"hybridnorm_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"run.plugins: {plugin} cannot be imported: {type(error).__name__}: {reason}") from error
