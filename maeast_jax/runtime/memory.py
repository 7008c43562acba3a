"""Memory of the host and of the devices: how much there is, what a program plans, what it keeps.

XLA allocates gigabytes of temporaries anew at each step. On a CPU glibc by default returns them to
the system in between, which then hands out each page again, zeroed: this costs an eighth to a fifth
of the base model's time (docs/benchmarks.md).
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from maeast_jax.runtime import terminal

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_DEFAULT_TRIM_BYTES, _DEFAULT_MMAP_MAX = 128 * 1024, 65_536
# A step's temporaries are one piece. Allocations between two steps may lie in the way of the next
# piece: up to four copies were seen for one in the plan.
_COPIES = 6

_has_one_heap = False


def share_heap() -> None:
    """Makes `keep_freed` possible in this process. Call it in a program's first line.

    It must run before anything starts threads, also before jax's backend does: a thread keeps the
    heap that it was given, and from any but the first heap glibc allocates large pieces from the
    system whatever mallopt says.
    """
    global _has_one_heap
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and _will_compute_on_cpu():
        _has_one_heap = bool(libc.mallopt(_M_ARENA_MAX, 1))


def keep_freed(planned_bytes: int) -> None:
    """Keeps the memory that this process frees from now on, where there is room.

    Without `share_heap` before, nothing is kept.

    Args:
      planned_bytes: The memory that XLA plans for the step on all devices of this machine. It must
        fit several times into the machine's memory.
    """
    if not _has_one_heap:
        return
    fits = _COPIES * planned_bytes < limit_bytes()
    libc = ctypes.CDLL(None)
    # Pieces of any size come from the heap, which never shrinks.
    libc.mallopt(_M_MMAP_MAX, 0 if fits else _DEFAULT_MMAP_MAX)
    libc.mallopt(_M_TRIM_THRESHOLD, -1 if fits else _DEFAULT_TRIM_BYTES)
    if not fits:
        libc.malloc_trim(0)


def limit_bytes() -> int:
    """Returns the bytes that a process may use: the machine's, or its control group's if fewer."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = _read("/sys/fs/cgroup/memory.max").strip()
    return min(machine, int(group)) if group.isdecimal() else machine


def available_bytes() -> int:
    """Returns four fifths of the memory that this machine, or its control group, has left.

    Programs hold more than XLA plans for their steps, hence the last fifth.
    """
    left = limit_bytes()
    # "anon" leaves out the group's files in the page cache, which make room.
    if used := re.search(r"^anon (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE):
        left -= int(used[1])
    if free := re.search(r"^MemAvailable: +(\d+) kB", _read("/proc/meminfo"), re.MULTILINE):
        left = min(left, int(free[1]) * 1024)
    return max(0, left) * 4 // 5


def _read(path: str) -> str:
    """Returns the text of a file of the kernel; "" on systems without it."""
    return Path(path).read_text() if Path(path).exists() else ""


def _will_compute_on_cpu() -> bool:
    """Whether jax will use the CPU by its settings or for want of plugins; starts no backend."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


class OutOfMemoryError(MemoryError):
    """The devices have less memory than a program needs."""


@contextmanager
def out_of_memory(remedy: str = "take less") -> Iterator[None]:
    """Raises OutOfMemoryError, in one line with the remedy, where the devices run out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = terminal.one_line(error)
        raise OutOfMemoryError(f"the devices are out of memory: {remedy} ({reason})") from None


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that XLA plans on a device for arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
