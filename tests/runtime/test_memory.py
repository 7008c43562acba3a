"""Freed memory is kept, so that a step costs no page faults, and limits are read correctly."""

import os
import subprocess
import sys

import jax
import pytest

from maeast_jax.runtime import memory

PROGRAM = """
import resource, sys
import jax
import jax.numpy as jnp
from maeast_jax.runtime import memory

if sys.argv[1] != "nothing":
    memory.share_heap()


@jax.jit
def step(x):  # the results of 64 MB are dropped at once
    return x + 1, x + 2


def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


x = jnp.ones((1000, 16_000))
memory.keep_freed(0 if sys.argv[1] == "keep" else 1 << 60)
faults(8)
print(faults(8))
"""


def faults(word, platforms="cpu"):
    environment = {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_faulted_in_again():
    # A plan that does not fit several times changes nothing.
    left = faults("too much")
    assert faults("keep") < left / 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_is_kept_also_where_no_platform_is_set_and_only_on_request():
    left = faults("nothing")
    assert faults("too much", "") > left / 2
    assert faults("keep", "") < left / 4


def test_available_is_four_fifths_of_the_memory_that_machine_and_group_have_left(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  5000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000\nfile 4000000\n",
    }
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.limit_bytes() == machine
    assert memory.available_bytes() == 5000 * 1024 * 4 // 5
    files["/sys/fs/cgroup/memory.max"] = "2000\n"
    assert memory.limit_bytes() == 2000
    assert memory.available_bytes() == 1000 * 4 // 5
    files["/sys/fs/cgroup/memory.max"] = "500\n"
    assert memory.available_bytes() == 0
    files.clear()
    assert memory.available_bytes() == machine * 4 // 5


def test_devices_without_memory_are_one_line_with_the_remedy():
    with pytest.raises(memory.OutOfMemoryError) as caught, memory.out_of_memory("eat less"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nfor a page")
    assert str(caught.value) == (
        "the devices are out of memory: eat less (RESOURCE_EXHAUSTED: no room for a page)"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.out_of_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: core halted")
