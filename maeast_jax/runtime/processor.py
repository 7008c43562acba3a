"""What the CPU of this machine can do."""

import functools
from pathlib import Path


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16, as Linux lists them for x86.

    False for other CPUs and systems: how fast XLA is at such products there is not known.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
