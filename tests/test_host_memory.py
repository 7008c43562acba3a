"""Freed memory is kept: what is allocated again costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from maeast_jax import host_memory

if sys.argv[1] == "keep":
    host_memory.keep_freed()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(64_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


counts = []
# As XLA, which allocates in threads of its own.
thread = threading.Thread(target=lambda: counts.extend([faults(), faults()]))
thread.start()
thread.join()
print(counts[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_was_freed_is_not_faulted_in_again():
    def faults(word):
        command = [sys.executable, "-c", PROGRAM, word]
        # numpy asks for huge pages of its own, which fault in 512 at once.
        environment = {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    # Even in huge pages it would be 30 an array.
    assert faults("keep") < 20
    assert faults("leave") > 100
