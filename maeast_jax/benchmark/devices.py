"""What a run's devices can do and hold, as measured and as they count it themselves."""

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maeast_jax.model import COMPUTE_DTYPES, product
from maeast_jax.runtime import memory, processor, sharding

# Sides of the square matrices whose products tell the rate: it is the best of them.
MATRIX_SIDES = (1024, 2048, 4096, 8192)
_CHAIN = 8  # products in a row
_CHAIN_SECONDS = 0.2  # a larger matrix is not tried after a chain that took longer
# Of jax: one for each program that XLA is given, whether or not a cache has it.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.cache
def matrix_rate(mesh: Mesh, dtype: str) -> float:
    """FLOP/s that the mesh's devices reach together in products of square matrices, measured once.

    By the model's own product: float32 in full; bfloat16 summed in float32 and rounded again.
    """
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = sharding.replicated(mesh)
    kind = COMPUTE_DTYPES[dtype]
    float32_factors = not processor.multiplies_bfloat16()

    def chain(left, right):
        for _ in range(_CHAIN):
            left = product("mk,kn->mn", left, right, float32_factors=float32_factors)
        return left

    chain = jax.jit(sharding.traced_on(mesh, chain), out_shardings=rows)
    best = 0.0
    for side in MATRIX_SIDES:
        # Noise: on zeros some devices are faster. Scaled so that a chain keeps its variance.
        random = np.random.default_rng(side)
        left = random.standard_normal((mesh.size * side, side), np.float32)
        right = random.standard_normal((side, side), np.float32) / math.sqrt(side)
        left = jax.device_put(jnp.asarray(left, kind), rows)
        right = jax.device_put(jnp.asarray(right, kind), whole)
        jax.block_until_ready(chain(left, right))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(chain(left, right))
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * _CHAIN * mesh.size * side**3 / min(seconds))
        if min(seconds) > _CHAIN_SECONDS:
            break
    return best


def memory_bytes(mesh: Mesh) -> int:
    """What a device may hold: jax's own limit, or its share of what this machine has left."""
    stats = mesh.devices.flat[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return memory.available_bytes() // mesh.size


@contextmanager
def counting_compiles() -> Iterator[list[float]]:
    """A list that grows by the seconds of each program compiled meanwhile."""
    compiled: list[float] = []

    def listen(event: str, duration_seconds: float, **_) -> None:
        if event == _COMPILED:
            compiled.append(duration_seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def peak_bytes(device: jax.Device) -> int | None:
    """The most that it has held since the process started; None where it does not count (CPU)."""
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else None
