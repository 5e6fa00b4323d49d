"""Memory for what computes on a CPU: the process begins once more with other settings of glibc.

XLA for CPUs takes a step's temporary arrays from malloc and gives them back after it, and malloc gives large ones back
to the system. So the system would map and clear them anew in every step. In huge pages it has less to map, and with a
heap that keeps what it was given back it has nothing to do at all. glibc reads GLIBC_TUNABLES when a process starts and
not later, so the process sets it and executes itself: with the same id, arguments, files and ignored signals.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# 0 keeps the process as it is.
VARIABLE = "HYBRIDNORM_HUGE_PAGES"
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
WANTED = f"{HUGE_PAGES}=1"
# Arrays of up to 512 MiB come from the heap as well, and it keeps what it was given back. Only the first arena can hold
# them, and which arena a thread of XLA gets is chance, so there may be no other. Larger arrays go back to the system:
# small ones that live longer split the room they leave, so that the heap grew three times by the 1.7 GB of a step's
# temporary arrays in a model of 8 layers of width 512.
KEPT_HEAP = (
    f"glibc.malloc.mmap_threshold={1 << 29}",
    f"glibc.malloc.trim_threshold={1 << 40}",
    "glibc.malloc.arena_max=1",
)
# The first version that knows the tunable.
GLIBC = (2, 35)
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def begin_again_with_huge_pages() -> None:
    """Where this process will compute on a CPU, execute it once more with huge pages; otherwise do nothing.

    Only for a process that is this program: it returns where nothing is to be done, and otherwise never. Call it before
    JAX is imported, so that nothing takes its time twice.
    """
    if not _is_worth_it(os.environ):
        return
    given = os.environ.get(TUNABLES, "")
    missing = [setting for setting in _wanted() if setting.partition("=")[0] not in given]
    environment = os.environ | {TUNABLES: ":".join([given, *missing] if given else missing)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # such as too long arguments; it can be done without
        return


def _wanted() -> tuple[str, ...]:
    """The tunables to set.

    The threads of XLA's compiler wait for each other where there is one arena: quickstart then compiles in 6 to 7 s
    instead of 4. So the heap is kept only where an earlier process has left compiled programs.
    """
    from hybridnorm_jax.commands.program_cache import has_kept_programs  # not needed where nothing is to be done

    return (WANTED, *KEPT_HEAP) if has_kept_programs() else (WANTED,)


def _is_worth_it(environment: Mapping[str, str]) -> bool:
    """Whether the setting would change something, and is not made or refused already."""
    if environment.get(VARIABLE) == "0" or HUGE_PAGES in environment.get(TUNABLES, ""):
        return False
    return bool(sys.executable) and _will_compute_on_a_cpu(environment) and _glibc_knows_it() and _system_has_them()


def _will_compute_on_a_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will take the CPU: it is asked to, or no package for another platform is installed."""
    asked = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME")
    if asked:
        return asked.split(",")[0].strip() == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins"))


def _glibc_knows_it() -> bool:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= GLIBC
    except (AttributeError, OSError, ValueError):  # another system, or another C library
        return False


def _system_has_them() -> bool:
    try:
        return "[never]" not in PAGES.read_text()
    except OSError:
        return False
