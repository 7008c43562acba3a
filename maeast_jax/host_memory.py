"""Host memory of programs that compute on the CPU."""

import ctypes
import importlib.metadata
import importlib.util

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """On CPU, has this process keep the memory that it frees, for good.

    XLA allocates the gigabytes of a step's temporaries anew at each step; by default they go back
    to the system in between, which then hands out each page again, zeroed: a fifth of the base
    model's time (docs/benchmarks.md). Costs some memory: pieces do not always fit together.

    To be called before anything starts threads, jax's backend too: a thread stays with the heap
    that it was given, and from any but the first glibc goes to the system for large pieces.
    """
    libc = ctypes.CDLL(None)
    if not _will_compute_on_cpu() or not hasattr(libc, "mallopt"):
        return
    # All from one heap, which alone can grow to any size, and never shrinks.
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)


def _will_compute_on_cpu() -> bool:
    """Whether jax is told to, or has nothing else installed; asked of no backend."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
