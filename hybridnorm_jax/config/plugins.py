"""Modules and files that run.plugins names: code of the user's own, imported before a configuration is read.

A plugin is imported only when this very start names it: on the command line, in a configuration file of the user's own
that the command line names, or in an argument of a Python function. A configuration that was saved with a run may come
from a stranger, and never imports anything. Which files are meant is compared by a digest of their sources.
"""

import dataclasses
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.config.plugin_files import contents, place, read, with_neighbours
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import ConfigError, RunStopped, first_line

KEY = "run.plugins"
# The sources of a larger plugin, such as a whole package, are compared but not kept.
MOST_KEPT_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plugin as it was imported.

    Attributes:
      name: as run.plugins names it.
      digest: SHA-256 (hexadecimal) of its sources, which are those that plugin_files.contents reads.
      sources: file name -> text; empty where they are larger than MOST_KEPT_BYTES, or are no text.
    """

    name: str
    digest: str
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)


# What this process has imported: the resolved path of a file, or the name of a module -> plugin.
_imported: dict[str, Plugin] = {}


def import_plugins(names: Iterable[str]) -> None:
    """Import what this start names; each once per process.

    Raises:
      ConfigError: one cannot be imported, or its file is no longer the one that this process imported.
    """
    for name in names:
        before = _imported.get(place(name))
        if before is None:
            _imported[place(name)] = _import(name)
        elif _describe(name).digest != before.digest:
            raise ConfigError(f"{KEY}: {name} has changed since this process imported it; start again")


def check_started_with_plugins(names: Sequence[str], origin: str) -> None:
    """Raise ConfigError where a saved configuration names plugins and this start names none."""
    if names and not _imported:
        (asked,) = as_arguments(names)
        raise ConfigError(
            f"{origin}: {asked}: a saved configuration runs no code; if you trust these files, "
            f"name them yourself: {asked}"
        )


def as_arguments(names: Sequence[str]) -> list[str]:
    """What names these plugins to any command that reads their run: one key=value, or nothing where there are none."""
    return [f"{KEY}={spelled(names)}"] if names else []


def plugins_of(names: Iterable[str]) -> tuple[Plugin, ...]:
    """The plugins of these names, as this process imported them or, where it did not, as they are now.

    Raises:
      ConfigError: one cannot be read.
    """
    return tuple(
        dataclasses.replace(_imported[place(name)], name=name) if place(name) in _imported else _describe(name)
        for name in names
    )


def imported() -> tuple[Plugin, ...]:
    """All plugins that this process has imported."""
    return tuple(_imported.values())


def to_json(plugins: Iterable[Plugin]) -> list[dict[str, Any]]:
    """Plugins as JSON has them, for a checkpoint."""
    return [dataclasses.asdict(plugin) for plugin in plugins]


def missing_plugin(saved: Sequence[dict[str, Any]], now: Iterable[Plugin]) -> dict[str, Any] | None:
    """The first saved plugin (as `to_json` wrote it) whose source is not among those of `now`, or None."""
    digests = {plugin.digest for plugin in now}
    return next((plugin for plugin in saved if plugin["digest"] not in digests), None)


def kind(name: str) -> str:
    """What run.plugins names, in a word."""
    return "file" if name.endswith(".py") else "module"


def namesake(saved: Mapping[str, Any], now: Iterable[Plugin]) -> Plugin | None:
    """The plugin that has the name of a saved one; of a file, which may have moved, the last part of its path."""
    name = os.path.basename(saved["name"])
    return next((plugin for plugin in now if os.path.basename(plugin.name) == name), None)


def changed_sources(saved: Mapping[str, Any], now: Plugin) -> list[str]:
    """Those of the sources that were kept of a saved plugin which it no longer has."""
    return [file for file, text in saved.get("sources", {}).items() if not _has(now, file, text)]


def sources_besides(saved: Mapping[str, Any], now: Plugin) -> list[str]:
    """The sources that a plugin has besides those that were kept of a saved one; none where one of these has changed.

    A version before the first release compared less of a plugin: the file of its module, or the folder of its package.
    """
    kept = saved.get("sources", {})
    if not kept or changed_sources(saved, now):
        return []
    return [file for file in sorted(now.sources) if not any(_is_at(file, other) for other in kept)]


def _has(plugin: Plugin, file: str, text: str) -> bool:
    return any(_is_at(path, file) and source == text for path, source in plugin.sources.items())


def _is_at(path: str, file: str) -> bool:
    """Whether that is the file, whose path may begin at a folder further down."""
    return path == file or path.endswith(f"/{file}")


def _import(name: str) -> Plugin:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return _describe(name)
        path = Path(place(name))
        source = read(path)
        # A name that follows from the path, so that what is pickled or registered by module has one.
        module_name = f"hybridnorm_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        module = types.ModuleType(module_name)
        module.__file__ = str(path)
        sys.modules[module_name] = module
        try:
            # The bytes that were read, not Python's cache of compiled code: the digest is that of what runs.
            exec(compile(source, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[module_name]
            raise
        return _plugin(name, with_neighbours(path, source))
    except (KeyboardInterrupt, RunStopped):
        raise
    except BaseException as error:  # SystemExit, too: the program is not the plugin's to end
        raise ConfigError(f"{KEY}: {name} cannot be imported: {_reason(error)}") from error


def _describe(name: str) -> Plugin:
    """The plugin as its files are now, without importing it."""
    try:
        return _plugin(name, contents(name))
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"{KEY}: {name} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, if it can say something."""
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except Exception:
        return type(error).__name__


def _plugin(name: str, sources: dict[str, bytes]) -> Plugin:
    digest = hashlib.sha256()
    for relative in sorted(sources):
        # Of a single file the name does not count: a copy of it elsewhere is the same plugin.
        heading = f"{os.fspath(relative)}\0" if len(sources) > 1 else ""
        digest.update(f"{heading}{len(sources[relative])}\0".encode() + sources[relative])
    return Plugin(name, digest.hexdigest(), _texts(sources))


def _texts(sources: dict[str, bytes]) -> dict[str, str]:
    if sum(map(len, sources.values())) > MOST_KEPT_BYTES:
        return {}
    try:
        return {name: content.decode() for name, content in sources.items()}
    except UnicodeDecodeError:
        return {}
