"""Compiled programs are kept on disk, so that the next process that needs one need not compile it.

This is JAX's persistent compilation cache, in the user's cache folder and with a limit. Where one of JAX's own
variables says otherwise, it decides: JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE,
JAX_COMPILATION_CACHE_MAX_SIZE, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

from hybridnorm_jax.errors import first_line
from hybridnorm_jax.whole_files import user_cache_folder

# The least recently used programs are removed beyond so many bytes.
MOST_BYTES = 4 << 30
# A program that compiles faster than this is not worth its file.
SHORTEST_SECONDS = 0.1
# What /proc/cpuinfo calls the instructions that a processor has, and the processor for which a compiler tunes.
_FEATURES = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")


def keep_programs(*, speaks: bool = True) -> None:
    """Keep what this process compiles from now on, and find what others have compiled.

    A folder that cannot be written ends in one line on standard error, and the process compiles everything itself.

    Args:
      speaks: whether this process prints that line; of several processes one does.
    """
    import jax  # here, because huge_pages.py asks for has_kept_programs before JAX is imported

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not jax.config.jax_enable_compilation_cache:
        return
    if (obstacle := _prepare(folder := program_folder())) is not None:
        if speaks:
            right = "JAX_COMPILATION_CACHE_DIR names another folder"
            print(f"compiled programs are not kept: {obstacle}; {right}", file=sys.stderr)
        return
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def has_kept_programs() -> bool:
    """Whether an earlier process has kept programs, so that this one may have little to compile."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or program_folder()
    try:
        return folder is not None and any(Path(folder).iterdir())
    except OSError:  # no such folder, or no folder that this user may read
        return False


def program_folder() -> Path | None:
    """hybridnorm_jax/programs/<processor> in the user's cache folder; None where the user has none."""
    root = user_cache_folder()
    return None if root is None else root / "programs" / processor_key()


def processor_key() -> str:
    """A digest of the machine's processor and of how many of its cores this process may use.

    XLA for CPUs compiles for the instructions that it finds, and for the number of threads, and JAX's own key of a
    program says nothing of either. A home directory may be shared by unlike machines.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = [platform.machine(), platform.processor(), str(cores), *_features()]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _features() -> list[str]:
    """The lines of /proc/cpuinfo that say what the first processor is; none where there is no such file."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return []
    return [line for line in first.splitlines() if line.partition(":")[0].strip() in _FEATURES]


def _prepare(folder: Path | None) -> str | None:
    """Make the folder; returns why it cannot be used, None where it can.

    What lies in it is executed, so it must be this user's own.
    """
    if folder is None:
        return "this user has no home directory"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        return first_line(error)
    if owner != os.getuid():
        return f"{folder} is another user's"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else f"{folder} cannot be written to"
