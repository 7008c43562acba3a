"""Freed memory is kept: what a compiled step allocates again costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax
import jax.numpy as jnp
from maeast_jax import host_memory

if sys.argv[1] == "keep":
    host_memory.keep_freed()


@jax.jit
def step(x):  # temporaries of 64 MB, kept from fusing
    for _ in range(3):
        x = jax.lax.optimization_barrier(x * 1.5)
    return x.sum()


def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


x = jnp.ones((1000, 16_000))
faults(20)
print(faults(20))
"""


def faults(word, platforms="cpu"):
    environment = {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("platforms", ["cpu", ""])
def test_memory_that_was_freed_is_not_faulted_in_again(platforms):
    """But for the few times that the pieces do not fit together."""
    assert faults("keep", platforms) < faults("leave") / 4
