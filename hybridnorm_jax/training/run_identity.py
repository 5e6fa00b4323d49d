"""Whether a directory holds the run that a configuration asks for: its keys, its plugins and its data.

What was saved with a checkpoint counts. A run's config.yaml is for people, who may have edited it; it counts only where
there is no checkpoint.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.resume_keys import differences, resume_differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml, read_file
from hybridnorm_jax.data.files.identity import FileIdentity, file_identity
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.saved_steps import SavedSteps
from hybridnorm_jax.whole_files import expanded, size_of, write_whole

# The keys that say with what a run began, which its first checkpoint holds from then on.
ORIGIN = ("init_from", "init_optimizer")
# Where a run's directory keeps the sources of its plugins, and the file in it that says with which ones it began.
SOURCES, USED = "plugins", "used.json"
# The name of the tokenizer among the files of a run.
TOKENIZER_FILE = "data.tokenizer"


class SavedRun(NamedTuple):
    """What a directory says of its run.

    Attributes:
      config: its configuration.
      step: of its newest checkpoint; None: it has none.
      plugins: each with a name and a digest, as config.plugins.to_json wrote them; None: unknown.
      files: what it trained on, as data_files gives them; None: unknown.
    """

    config: RunConfig
    step: int | None
    plugins: list[dict[str, Any]] | None
    files: list[dict[str, Any]] | None = None


def check_same_run(directory: epath.Path, config: RunConfig) -> RunConfig:
    """Refuse a directory whose checkpoints, metrics or result are those of another run.

    Returns the configuration with what the run began with (init_from), where it has a checkpoint and none is asked for:
    the command that goes on with a run needs not name its beginning again, and the run's files go on naming it.

    Where there is none of these, a run may have been killed before it saved anything. Then other keys may be asked for,
    but not another beginning (init_from): the user might not notice that the run trains from fresh parameters.

    Raises:
      ConfigError: names every key that differs, or the plugin.
    """
    saved = saved_run(directory)
    if saved is None:
        return config
    has_results = saved.step is not None or _has_results(directory)
    if saved.step is not None:
        if config.init_from is None:
            begun = {name: getattr(saved.config, name) for name in ORIGIN}
            config = dataclasses.replace(config, **begun)
        differing = resume_differences(saved.config, config, saved.step)
    else:
        differing = differences(saved.config, config)
        if not has_results:
            differing = [line for line in differing if line.partition(":")[0] in ORIGIN]
    if differing:
        raise ConfigError(f"{directory} holds another run ({'; '.join(differing)}): choose another run.name")
    if has_results:
        now = plugins.plugins_of(config.run.plugins)
        check_same_plugins(saved.plugins, now, where=place_of(directory, saved), kept=directory)
    return config


def check_same_plugins(
    saved: Sequence[dict[str, Any]] | None,
    now: Sequence[plugins.Plugin],
    *,
    where: str,
    kept: epath.Path,
    more_allowed: bool = False,
) -> None:
    """Refuse plugins whose sources are not those that were saved; say so where nobody can know.

    That is where none were saved, or fewer than are compared now.

    Args:
      saved: as config.plugins.to_json wrote them; None: by a version that kept none.
      now: the plugins of this start.
      where: what was trained with the saved ones.
      kept: the run's directory.
      more_allowed: there may be plugins that were not saved.

    Raises:
      ConfigError: names the plugin and says where its source of then is.
    """
    if saved is None:
        if now:
            unknown = "saved by a version that kept no digests of plugins; they may have been others"
            say(f"{where}: {unknown}", file=sys.stderr)
        return
    digests = {plugin["digest"] for plugin in saved}
    while (missing := plugins.missing_plugin(saved, now)) is not None:
        same_name = plugins.namesake(missing, now)
        besides = [] if same_name is None else plugins.sources_besides(missing, same_name)
        if not besides:
            raise ConfigError(_other_plugin(missing, same_name, where=where, kept=kept))
        compared = f"{where}: of the plugin {missing['name']} only {', '.join(missing['sources'])} was compared then"
        say(f"note: {compared}, which is unchanged; {besides[0]} may have been another", file=sys.stderr)
        digests.add(same_name.digest)
        saved = [plugin for plugin in saved if plugin != missing]
    added = next((plugin.name for plugin in now if plugin.digest not in digests), None)
    if added is not None and not more_allowed:
        raise ConfigError(f"{plugins.KEY}: {added}: {where}, was trained without it; choose another run.name")


def _other_plugin(saved: dict[str, Any], same_name: plugins.Plugin | None, *, where: str, kept: epath.Path) -> str:
    """What is said where a saved plugin is not among those of this start.

    Args:
      same_name: one of this start that has its name.
    """
    name, kind = saved["name"], plugins.kind(saved["name"])
    folder = kept / SOURCES / saved["digest"][:12]
    # Of a large plugin no sources are kept.
    right = f"name that {kind}" + (f" (its source of then is in {folder})" if folder.exists() else "")
    wrong = f"{where}, was trained with {name}, which this start does not name"
    if same_name is not None:
        changed = plugins.changed_sources(saved, same_name)
        # Of a single file it is clear.
        what = f" ({changed[0]} has changed)" if changed and len(saved["sources"]) > 1 else ""
        wrong = f"{name} is not the {kind} that {where}, was trained with{what}"
    return f"{plugins.KEY}: {wrong}; {right}, or start a new run under another run.name"


def keep_sources(directory: epath.Path, used: Sequence[plugins.Plugin]) -> None:
    """Write the sources of plugins into a run's directory, each under its digest, for who has edited them since.

    A file beside them says which ones are used now: a run may end before its first checkpoint, which would say so.
    """
    file = directory / SOURCES / USED
    if used or file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [{"name": plugin.name, "digest": plugin.digest} for plugin in used]
        write_whole(file, json.dumps(names, indent=2) + "\n")
    for plugin in used:
        folder = directory / SOURCES / plugin.digest[:12]
        for name, text in plugin.sources.items():
            file = folder / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)


def data_files(data: DataSection, trained_on: Mapping[str, Sequence[FileIdentity]]) -> list[dict[str, Any]]:
    """The identities of the files that a run trains on, in order, and of its tokenizer, as JSON has them.

    Args:
      trained_on: the files of each source by its name, which is "" without a mixture; in one, a file is named
        SOURCE/NAME.
    """
    files = [
        dataclasses.replace(file, name=f"{source}/{file.name}" if source else file.name)
        for source, ones in trained_on.items()
        for file in ones
    ]
    if data.has_tokenizer_file:
        files.append(file_identity(epath.Path(expanded(data.tokenizer)), name=TOKENIZER_FILE))
    return [dataclasses.asdict(file) for file in files]


def check_same_files(
    saved: Sequence[dict[str, Any]] | None,
    now: Sequence[dict[str, Any]],
    *,
    where: str,
    key: str = "data.files",
    right: str = "restore the data as they were, or start a new run with init_from",
) -> None:
    """Refuse data other than those that were saved, by the first file that differs; say so where none were saved.

    Args:
      saved, now: identities, as data_files gives them.
      where: what they were saved in.
      key: names the data.
      right: what can be done, for the message.

    Raises:
      ConfigError: names the file and what is another.
    """
    if saved is None:
        unknown = "saved by a version that kept no digests of data; they may have been others"
        say(f"{where}: {unknown}", file=sys.stderr)
        return
    ours, theirs = ([FileIdentity(**file) for file in files] for files in (now, saved))
    for index in range(max(len(ours), len(theirs))):
        before = theirs[index] if index < len(theirs) else None
        after = ours[index] if index < len(ours) else None
        if before != after:
            raise ConfigError(f"{key}: {_other(before, after)} when {where} was saved; {right}")


def _other(before: FileIdentity | None, after: FileIdentity | None) -> str:
    """How one file is another than it was, as the beginning of a sentence that ends with a time."""
    if after is None:
        return f"{before.name} is not read now, but was"
    if before is None:
        return f"{after.name} is read now, but was not"
    if before.name != after.name:
        return f"{after.name} is read now in the place of {before.name}, which was read"
    if before.size != after.size:
        return f"{after.name} has {after.size:,} bytes now, but had {before.size:,}"
    return f"{after.name} has another content than it had"


def saved_run(directory: epath.Path) -> SavedRun | None:
    """What the newest checkpoint in a directory says of its run, or config.yaml where there is none; None: nothing.

    Raises:
      ConfigError: names the file that cannot be read, or the plugins that it names and this start does not.
    """
    if (directory / "checkpoints").exists():
        checkpoints = SavedSteps(directory / "checkpoints")
        glance = checkpoints.glance()
        if glance is not None:
            origin = f"{directory}/checkpoints/{glance.step:06d}"
            return SavedRun(_configuration(glance.config_yaml, origin), glance.step, glance.plugins, glance.files)
    file = directory / "config.yaml"
    if not file.exists():
        return None
    config = _configuration(read_file(file), str(file))
    return SavedRun(config, None, _used_plugins(directory, config))


def place_of(directory: epath.Path, saved: SavedRun) -> str:
    """Where it was saved, for messages."""
    return str(directory) if saved.step is None else f"{directory}, step {saved.step}"


def _configuration(text: str, origin: str) -> RunConfig:
    try:
        return from_yaml(text, origin=origin)
    except ConfigError as error:
        if str(error).startswith(origin):
            raise
        raise ConfigError(f"{origin}: {error}") from error


def _used_plugins(directory: epath.Path, config: RunConfig) -> list[dict[str, Any]] | None:
    """The plugins of a run without a checkpoint, as keep_sources wrote them; None: by a version that did not."""
    if not config.run.plugins:
        return []
    file = directory / SOURCES / USED
    if not file.exists():
        return None
    try:
        used = json.loads(file.read_bytes())
        return [{"name": str(plugin["name"]), "digest": str(plugin["digest"])} for plugin in used]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: must be a JSON list of the names and digests of plugins") from error


def _has_results(directory: epath.Path) -> bool:
    """Whether there is something in a run's directory that another run would overwrite or be taken for."""
    if any((directory / name).exists() for name in ("result.json", "checkpoints")):
        return True
    return any(path.name.startswith("metrics") and size_of(path) for path in directory.iterdir())
