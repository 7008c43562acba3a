"""What devices do and hold, against a clock and a memory of the test's own."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax.benchmark import devices
from maeast_jax.runtime import memory, sharding


def test_programs_that_are_compiled_are_counted_and_those_that_only_run_are_not():
    x = jnp.arange(7.0)
    known = jax.jit(lambda x: x * 3.0)
    known(x)
    with devices.counting_compiles() as compiled:
        known(x)
        assert compiled == []
        jax.jit(lambda x: x * 5.0 - 1.0)(x)
        assert len(compiled) == 1
    jax.jit(lambda x: x * 7.0 - 1.0)(x)
    assert len(compiled) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrix_rate_is_the_best_of_the_products_of_all_devices(monkeypatch, dtype):
    monkeypatch.setattr(devices, "MATRIX_SIDES", (16, 32, 64, 128))
    # Seconds of the three timings of each side; a chain of 0.5 s is the last.
    seconds = iter([1.0, 0.2, 1.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7])
    times = (time for taken in seconds for time in (10.0, 10.0 + taken))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(times))
    mesh = sharding.make_mesh(data=2)
    devices.matrix_rate.cache_clear()
    rate = devices.matrix_rate(mesh, dtype)
    flops = {side: 2 * 8 * 2 * side**3 for side in (16, 32, 64)}
    assert rate == pytest.approx(max(flops[16] / 0.2, flops[32] / 0.1, flops[64] / 0.5))
    assert next(times, None) is None
    assert devices.matrix_rate(mesh, dtype) == rate  # from before: the clock has run out
    devices.matrix_rate.cache_clear()


def fake_mesh(stats, size=4):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    return types.SimpleNamespace(devices=np.array([device] * size), size=size)


def test_memory_is_the_devices_limit_or_a_share_of_what_the_machine_has_left(monkeypatch):
    assert devices.memory_bytes(fake_mesh({"bytes_limit": 123, "peak_bytes_in_use": 45})) == 123
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert devices.memory_bytes(fake_mesh(None)) == 250
    (device,) = fake_mesh({"bytes_limit": 123, "peak_bytes_in_use": 45}, size=1).devices
    assert devices.peak_bytes(device) == 45
    assert devices.peak_bytes(jax.devices()[0]) is None
