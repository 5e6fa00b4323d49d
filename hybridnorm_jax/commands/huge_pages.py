"""Memory in huge pages for what computes on a CPU: the process begins once more with another setting of glibc.

XLA for CPUs takes a step's temporary arrays from malloc and gives them back after it. In pages of 4 KiB the system maps
and clears them anew in every step. In huge pages it has less to map. glibc reads GLIBC_TUNABLES when a process starts
and not later, so the process sets it and executes itself: with the same id, arguments, files and ignored signals.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# 0 keeps the process as it is.
VARIABLE = "HYBRIDNORM_HUGE_PAGES"
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
# A heap that keeps all it was given back (mmap_max=0, arena_max=1, trim_threshold=2^31 - 1) was tried as well, on two
# cores of a quiet Xeon on 2026-11-27: quickstart gained nothing, and 8 layers of width 512 lost a third of their speed.
WANTED = f"{HUGE_PAGES}=1"
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
    environment = os.environ | {TUNABLES: f"{given}:{WANTED}" if given else WANTED}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # such as too long arguments; it can be done without
        return


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
