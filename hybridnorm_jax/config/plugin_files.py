"""Which source files belong to a plugin, found and read without importing anything.

Of a plugin in a package these are all Python files of its outermost package. Of one that is a single file they are that
file, and what it imports by name that lies beside it, as far as Python would find it there. What else a plugin imports,
such as an installed package, and the files that it reads are not among them.
"""

import ast
import errno
import importlib.machinery
import os
import sys
import sysconfig
from pathlib import Path

from hybridnorm_jax.whole_files import expanded

MOST_BYTES = 64 << 20
MOST_ENTRIES = 100_000
LIBRARY = __name__.partition(".")[0]
# A directory with both is a run's. The sources that it keeps are no part of the package that the run may lie in.
OF_A_RUN = {"config.yaml", "plugins"}


def place(name: str) -> str:
    """What tells plugins apart in one process: a file by its path, a module by its name."""
    # Not Path.resolve, which raises where links lead in a circle.
    return os.path.realpath(expanded(name)) if name.endswith(".py") else name


def read(file: Path) -> bytes:
    """The source in a file; OSError for what is no regular file, which may never end, and for what is no source."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(file))
    _check_size(file.stat().st_size, file)
    return file.read_bytes()


def contents(name: str) -> dict[str, bytes]:
    """The sources of a plugin by name, those in folders by path; none of a module that is part of Python.

    Raises:
      OSError, ImportError, ValueError: there is no such plugin, or it cannot be read.
    """
    if name.endswith(".py"):
        return with_neighbours(Path(place(name)))
    _find_spec(name)
    spec = _find_spec(name.partition(".")[0])
    if spec.submodule_search_locations:
        found = {}
        for folder in map(Path, spec.submodule_search_locations):
            # Of a name that is in several folders Python takes the first.
            found = _in_package(folder) | found
        return _read_all(found)
    if not (spec.has_location and spec.origin):
        return {}
    return with_neighbours(Path(os.path.realpath(spec.origin)))


def with_neighbours(file: Path, source: bytes | None = None) -> dict[str, bytes]:
    """The source of a file, and of the modules beside it that it imports, itself or through one of these.

    Args:
      source: the content of the file, where it has been read.
    """
    found = {file.name: read(file) if source is None else source}
    if file.parent in _installed():
        return found
    waiting = [found[file.name]]
    while waiting:
        for name in sorted(_imports(waiting.pop())):
            beside = {path: at for path, at in _beside(file.parent, name).items() if path not in found}
            new = _read_all(beside)
            found |= new
            waiting += new.values()
            _check_size(sum(map(len, found.values())), file)
    return found


def _installed() -> set[Path]:
    """The folders of Python's own modules and of what is installed, where everything lies beside everything."""
    return {Path(os.path.realpath(folder)) for folder in sysconfig.get_paths().values()}


def _imports(source: bytes) -> set[str]:
    """The first part of each module that a source imports by its whole name; none where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - {LIBRARY}


def _beside(folder: Path, name: str) -> dict[str, Path]:
    """The files of a module in a folder, if that is where Python finds the module; else none."""
    if not ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
        return {}
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None:
        return {}
    if spec.submodule_search_locations:
        if str(folder / name) not in map(os.path.realpath, spec.submodule_search_locations):
            return {}
        return {f"{name}/{path}": file for path, file in _in_package(folder / name).items()}
    file = folder / f"{name}.py"
    is_here = spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)
    return {file.name: file} if is_here else {}


def _in_package(package: Path) -> dict[str, Path]:
    """The Python files in a directory and below, by their paths in it. Links to directories are not followed."""
    found, entries = {}, 0
    for root, folders, files in os.walk(package):
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            raise OSError(errno.EFBIG, f"more than {MOST_ENTRIES:,} files, which no package has", str(package))
        if {*folders, *files} >= OF_A_RUN:
            folders.clear()
            continue
        # Nothing in .git, .venv or run-1 can be imported.
        folders[:] = sorted(folder for folder in folders if folder.isidentifier())
        at = Path(root)
        found |= {(at / file).relative_to(package).as_posix(): at / file for file in files if file.endswith(".py")}
    return found


def _read_all(files: dict[str, Path]) -> dict[str, bytes]:
    found, size = {}, 0
    for path, file in files.items():
        found[path] = read(file)
        size += len(found[path])
        _check_size(size, file)
    return found


def _check_size(size: int, file: Path) -> None:
    if size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"more than {MOST_BYTES >> 20} MiB, which no source has", str(file))


def _find_spec(name: str) -> importlib.machinery.ModuleSpec:
    """As importlib.util.find_spec, which would import the packages that a module is in."""
    if name in sys.builtin_module_names:
        return importlib.machinery.BuiltinImporter.find_spec(name)
    folders, found = None, ""
    for part in name.split("."):
        found = f"{found}.{part}" if found else part
        spec = importlib.machinery.PathFinder.find_spec(found, folders)
        if spec is None:
            raise ImportError(f"no module named {found}")
        folders = spec.submodule_search_locations
    return spec
