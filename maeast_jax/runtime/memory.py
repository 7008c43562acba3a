"""Host memory of programs that compute on the CPU.

XLA allocates the gigabytes of a step's temporaries anew at each step; by default they go back to
the system in between, which then hands out each page again, zeroed: an eighth to a fifth of the
base model's time (docs/benchmarks.md).
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_DEFAULT_TRIM_BYTES, _DEFAULT_MMAP_MAX = 128 * 1024, 65_536
# A step's temporaries are one piece, and what is allocated between two steps may lie in the way of
# the next: up to four copies were seen, where the plan counts one.
_COPIES = 6

_has_one_heap = False


def share_heap() -> None:
    """Makes `keep_freed` possible in this process; a program's first line.

    Before anything starts threads, jax's backend too: a thread stays with the heap that it was
    given, and from any but the first glibc goes to the system for large pieces, whatever is asked.
    """
    global _has_one_heap
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and _will_compute_on_cpu():
        _has_one_heap = bool(libc.mallopt(_M_ARENA_MAX, 1))


def keep_freed(planned_bytes: int) -> bool:
    """Whether this process keeps, from now on, the memory that it frees.

    It does after `share_heap`, where several times `planned_bytes`, what XLA plans for the step on
    all devices of this machine, fit into its memory.
    """
    if not _has_one_heap:
        return False
    fits = _COPIES * planned_bytes < limit_bytes()
    libc = ctypes.CDLL(None)
    # Pieces of any size from the heap, which never shrinks.
    libc.mallopt(_M_MMAP_MAX, 0 if fits else _DEFAULT_MMAP_MAX)
    libc.mallopt(_M_TRIM_THRESHOLD, -1 if fits else _DEFAULT_TRIM_BYTES)
    if not fits:
        libc.malloc_trim(0)
    return fits


def limit_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(group)) if group.isdecimal() else machine


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has left, or its control group.

    Four fifths of it: programs hold more than XLA plans for their steps.
    """
    left = _listed_bytes("/proc/meminfo", "MemAvailable:")
    # Without the group's files in the page cache, which make room.
    within = limit_bytes() - (_listed_bytes("/sys/fs/cgroup/memory.stat", "anon") or 0)
    return max(0, within if left is None else min(left, within)) * 4 // 5


def _listed_bytes(path: str, name: str) -> int | None:
    """The number behind a name in a file of the kernel's; None where there is none."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return None
    return next(
        (
            int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
            for words in lines
            if words[0] == name
        ),
        None,
    )


def _will_compute_on_cpu() -> bool:
    """Whether jax is told to, or has nothing else installed; asked of no backend."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


class OutOfMemoryError(MemoryError):
    """The devices do not hold what a program needs."""


@contextmanager
def out_of_memory(remedy: str = "take less") -> Iterator[None]:
    """Raises OutOfMemoryError, in one line, where the devices or the compiler run out of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0]
        raise OutOfMemoryError(f"the devices are out of memory: {remedy} ({line})") from None


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory that XLA plans for a program: arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
