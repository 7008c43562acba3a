"""Host memory of programs that compute on the CPU."""

import ctypes

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """On CPU, has this process keep the memory that it frees, for good.

    XLA allocates the gigabytes of a step's temporaries anew at each step; by default they go back
    to the system in between, which then hands out each page again, zeroed: a fifth of the base
    model's time (docs/benchmarks.md). Costs some memory: pieces do not always fit together.
    """
    libc = ctypes.CDLL(None)
    if jax.default_backend() != "cpu" or not hasattr(libc, "mallopt"):
        return
    # All from one heap, which alone can grow to any size, and never shrinks.
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)
