"""Speed and costs of a run's training step: seconds, memory, operations.

A step is compiled as training compiles it, on the run's mesh. A measurement begins when the devices
have no work left, and ends when they have no work left.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maeast_jax.model import COMPUTE_DTYPES, flops, product
from maeast_jax.runtime import memory, processor, sharding
from maeast_jax.runtime.cli import NonFiniteError
from maeast_jax.training import Pretraining, loop

# A row's time is divided into so many samples. The median needs so many at least.
SAMPLES = 20
LEAST_SAMPLES = 3
# On a CPU the memory that jax keeps (runtime/memory.py) grows until about the fourth step.
WARM_STEPS = 4
# Sides of the square matrices that matrix_rate multiplies; the best rate counts.
MATRIX_SIDES = (1024, 2048, 4096, 8192)
_CHAIN = 8  # products in a row
_CHAIN_SECONDS = 0.2  # after a slower chain, no larger matrix is tried
# jax reports one event per program that it gives to XLA, also if a cache has the program.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run with its compiled step."""

    training: Pretraining
    step: jax.stages.Compiled
    compile_seconds: float

    @property
    def batch_size(self) -> int:
        return self.training.config.batch_size

    @property
    def flops_per_clip(self) -> int:
        """Operations on paper, three times those of the forward pass."""
        config = self.training.config
        return 3 * flops.pretrain_forward(config.model, config.num_frames)


def compile_step(training: Pretraining) -> Subject:
    """Compiles the step; raises memory.OutOfMemoryError if the compiler finds no room for it."""
    start = time.perf_counter()
    with memory.out_of_memory():
        step = training.compile_step()
    seconds = time.perf_counter() - start
    memory.keep_freed(jax.device_count() * memory.planned_bytes(step))  # as training does
    return Subject(training, step, seconds)


def costs(subject: Subject) -> dict[str, Any]:
    """Returns the costs of a step that are known before it runs.

    flops_per_clip: Operations on paper.
    peak_memory_bytes: Memory per device, as XLA plans it.
    compile_seconds: Time of the compilation.
    """
    return {
        "flops_per_clip": subject.flops_per_clip,
        "peak_memory_bytes": memory.planned_bytes(subject.step),
        "compile_seconds": subject.compile_seconds,
    }


def measure(subject: Subject, seconds: float) -> dict[str, Any]:
    """Returns the speed of a step on one batch that stays on the devices.

    clips_per_second, step_seconds: Of the median sample; _p10 and _p90 are percentiles of the
      samples.
    samples, steps: Number of samples; number of steps, those before the samples included.
    matrix_rate: FLOP/s that the devices reach in plain matrix products.
    matrix_rate_share: Operations on paper per second, as a share of that rate.
    device_peak_bytes: The device's own count. None if it does not count, or if an earlier row held
      more.
    recompiles: Programs that were compiled while steps were timed.

    Raises:
      memory.OutOfMemoryError: the devices have no room.
      NonFiniteError: the loss of the last step is not finite.
    """
    training = subject.training
    rate = matrix_rate(training.mesh, training.config.model.dtype)
    device = training.mesh.devices.flat[0]
    before = peak_bytes(device)
    with memory.out_of_memory():
        steps = _Steps(subject)
        with counting_compiles() as compiled:
            samples = time_steps(steps.advance, seconds)
        loss = steps.loss()
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} after {steps.count} steps on one batch")
    after = peak_bytes(device)
    step_seconds = float(np.median(samples))
    slow, fast = (subject.batch_size / np.percentile(samples, [90, 10])).tolist()
    clips_per_second = subject.batch_size / step_seconds
    return {
        "clips_per_second": clips_per_second,
        "clips_per_second_p10": slow,
        "clips_per_second_p90": fast,
        "step_seconds": step_seconds,
        "samples": len(samples),
        "steps": steps.count,
        "matrix_rate": rate,
        "matrix_rate_share": subject.flops_per_clip * clips_per_second / rate,
        "device_peak_bytes": after if after is not None and after > before else None,
        "recompiles": len(compiled),
    }


def measure_input(subject: Subject, seconds: float) -> dict[str, Any]:
    """Returns clips per second of the run's input alone, and of input and steps together."""
    with closing(subject.training.train_batches()) as batches:
        alone = _turns_per_second(lambda: jax.block_until_ready(next(batches)), seconds)
    with memory.out_of_memory():
        # One step before the stream opens, or the stream could read ahead during a compilation.
        steps = _Steps(subject)
        steps.advance(1)
    with closing(subject.training.train_batches()) as batches, memory.out_of_memory():
        together = _turns_per_second(lambda: steps.feed(batches), seconds, steps.wait)
    return {
        "input_clips_per_second": alone * subject.batch_size,
        "together_clips_per_second": together * subject.batch_size,
    }


def time_steps(advance: Callable[[int], None], seconds: float) -> list[float]:
    """Returns seconds per step in each sample; the samples take `seconds` together.

    There are at least LEAST_SAMPLES. A sample has as many steps as take a SAMPLES-th of the time,
    and at least one. The first WARM_STEPS do not count, nor does the first sample of several steps,
    which only tells their number.

    Args:
      advance: Does so many steps, and waits for the last one.
      seconds: Time of all samples.
    """
    clock = time.perf_counter
    for _ in range(WARM_STEPS - 1):
        advance(1)
    start = clock()
    advance(1)
    count = max(1, round(seconds / SAMPLES / (clock() - start)))
    if count > 1:
        start = clock()
        advance(count)
        count = max(1, round(seconds / SAMPLES / (clock() - start) * count))
    samples, first = [], clock()
    while len(samples) < LEAST_SAMPLES or clock() - first < seconds:
        start = clock()
        advance(count)
        samples.append((clock() - start) / count)
    return samples


class _Steps:
    """A training state that steps move on, with one batch again and again or with a stream."""

    def __init__(self, subject: Subject):
        self._step = subject.step
        self._state = subject.training.initial_state()
        with closing(subject.training.train_batches()) as batches:
            self._batch = next(batches)
        self._in_flight: list[Any] = []
        self.count = 0

    def advance(self, count: int) -> None:
        """Does `count` steps on the same batch, and waits for the last one."""
        for _ in range(count):
            self._do(self._batch)
        self.wait()

    def feed(self, batches: Iterator) -> None:
        """Does one step as the training loop does: the devices work while the next batch comes."""
        self._do(next(batches))
        if len(self._in_flight) > loop.STEPS_IN_FLIGHT:
            jax.block_until_ready(self._in_flight.pop(0))

    def wait(self) -> None:
        jax.block_until_ready(self._in_flight)
        del self._in_flight[:-1]

    def loss(self) -> float:
        total, count = jax.device_get(self._in_flight[-1]["loss"])
        return float(total / count)

    def _do(self, batch) -> None:
        self._state, metrics = self._step(self._state, batch)
        self._in_flight.append(metrics)
        self.count += 1


def _turns_per_second(
    turn: Callable[[], Any], seconds: float, wait: Callable[[], None] = lambda: None
) -> float:
    """Returns the rate of turns, after four turns that use up the batches that were read ahead."""
    clock = time.perf_counter
    for _ in range(4):
        turn()
    wait()
    start, turns = clock(), 0
    while turns < LEAST_SAMPLES or clock() - start < seconds:
        turn()
        turns += 1
    wait()
    return turns / (clock() - start)


@functools.cache
def matrix_rate(mesh: Mesh, dtype: str) -> float:
    """Returns the FLOP/s of all devices together in products of square matrices; measures once.

    It uses the model's own product: float32 in full precision; bfloat16 summed in float32.
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
        # Noise, because some devices are faster on zeros; scaled so that the variance stays.
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
    """Returns the memory per device: jax's own limit, or a share of this machine's free memory."""
    stats = mesh.devices.flat[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return memory.available_bytes() // mesh.size


def peak_bytes(device: jax.Device) -> int | None:
    """Returns the most memory ever in use, or None on devices that do not count (CPU)."""
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


@contextmanager
def counting_compiles() -> Iterator[list[float]]:
    """Yields a list that gets the seconds of each program that is compiled meanwhile."""
    compiled: list[float] = []

    def listen(event: str, duration_seconds: float, **_) -> None:
        if event == _COMPILED:
            compiled.append(duration_seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
