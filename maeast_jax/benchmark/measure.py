"""How fast a run's training step is, and what it takes: seconds, memory, operations.

A step is compiled as training compiles it, ahead and on the run's mesh. Times are the host's, from
a moment when the devices have nothing left to do to the next one.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from maeast_jax.benchmark import devices
from maeast_jax.model import flops
from maeast_jax.runtime import memory
from maeast_jax.runtime.cli import NonFiniteError
from maeast_jax.training import pretraining
from maeast_jax.training.loop import STEPS_IN_FLIGHT
from maeast_jax.training.pretraining import Run
from maeast_jax.training.programs import Programs

Clock = Callable[[], float]
# What a row's time is shared among, and how many of them a median is taken over at least.
SAMPLES = 20
LEAST_SAMPLES = 3
# On a CPU the heap that is kept (runtime/memory.py) grows until about the fourth step.
WARM_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run's step, compiled."""

    checked: Run
    programs: Programs
    step: jax.stages.Compiled
    compile_seconds: float

    @property
    def batch_size(self) -> int:
        return self.checked.config.batch_size

    @property
    def planned_bytes(self) -> int:
        """Memory a device."""
        return memory.planned_bytes(self.step)


def compile_step(checked: Run, clock: Clock = time.perf_counter) -> Subject:
    """Raises memory.OutOfMemoryError where the compiler already finds that it does not fit."""
    start = clock()
    programs = Programs(checked)
    with memory.out_of_memory():
        step = programs.step()
    subject = Subject(checked, programs, step, clock() - start)
    memory.keep_freed(jax.device_count() * subject.planned_bytes)  # as training does
    return subject


def costs(subject: Subject) -> dict[str, Any]:
    """What is known of a step before it runs.

    flops_per_clip: on paper, three times the forward pass.
    xla_flops_per_clip: as XLA counts the program that it made, elementwise work with it; None where
      the layers (`model.unroll=False`) or the parts of a batch are a loop, whose body it counts
      once, and on backends that do not count.
    peak_memory_bytes: a device's, as XLA plans it.
    """
    config, mesh = subject.checked.config, subject.checked.mesh
    xla = None
    if config.model.unroll and config.accumulation_steps == 1:
        xla = _counted_flops(subject.step)
    return {
        "flops_per_clip": 3 * flops.pretrain_forward(subject.checked.model, config.num_frames),
        "xla_flops_per_clip": xla and round(xla * mesh.size / subject.batch_size),
        "peak_memory_bytes": subject.planned_bytes,
        "compile_seconds": subject.compile_seconds,
    }


def _counted_flops(step: jax.stages.Compiled) -> float | None:
    """A device's, as XLA counts them; None where it does not."""
    try:
        costs = step.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return costs.get("flops") if costs else None


def measure(subject: Subject, seconds: float, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Times a step on one batch that stays on the devices.

    clips_per_second and step_seconds are those of the median sample, the percentiles those of the
    samples. matrix_rate_share is of what the devices reach in plain matrix products, with the
    operations on paper. device_peak_bytes is the device's own count, None where it has none or was
    higher before. recompiles: programs compiled while steps were timed.

    Raises memory.OutOfMemoryError; NonFiniteError where the loss ends as no number.
    """
    checked, batch_size = subject.checked, subject.batch_size
    rate = devices.matrix_rate(checked.mesh, checked.model.dtype)
    device = checked.mesh.devices.flat[0]
    before = devices.peak_bytes(device)
    with memory.out_of_memory():
        steps = _Steps(subject)
        with devices.counting_compiles() as compiled:
            samples = time_steps(steps.advance, seconds, clock)
        loss = steps.loss()
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} after {steps.count} steps of one batch")
    after = devices.peak_bytes(device)
    step_seconds = float(np.median(samples))
    slow, fast = (batch_size / np.percentile(samples, [90, 10])).tolist()
    work = 3 * flops.pretrain_forward(checked.model, checked.config.num_frames)
    return {
        "clips_per_second": batch_size / step_seconds,
        "clips_per_second_p10": slow,
        "clips_per_second_p90": fast,
        "step_seconds": step_seconds,
        "samples": len(samples),
        "steps": steps.count,
        "matrix_rate": rate,
        "matrix_rate_share": work * batch_size / step_seconds / rate,
        "device_peak_bytes": after if after is not None and after > before else None,
        "recompiles": len(compiled),
    }


def measure_input(
    subject: Subject, seconds: float, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Clips a second of the run's input alone, and of input and steps together as in training."""
    with _stream(subject.checked) as batches:
        alone = _clips_per_second(lambda: next(batches), subject.batch_size, seconds, clock)
    with memory.out_of_memory():
        # First: compiling it would leave the stream time to read ahead.
        steps = _Steps(subject)
        steps.advance(1)
    with _stream(subject.checked) as batches, memory.out_of_memory():
        together = _clips_per_second(
            lambda: steps.feed(batches), subject.batch_size, seconds, clock, steps.wait
        )
    return {"input_clips_per_second": alone, "together_clips_per_second": together}


def time_steps(
    advance: Callable[[int], None], seconds: float, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds a step in each of LEAST_SAMPLES or more samples, which take `seconds` in all.

    advance: does so many steps and waits for the last. A sample is of as many steps as make it a
      SAMPLES-th of the time, one where a step takes longer. Not counted are the first WARM_STEPS,
      and a whole sample where that is more than a step.
    """
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
    """A state on its way through steps, of one batch that stays or of batches as they come."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._state = subject.programs.initial_state()
        with _stream(subject.checked) as batches:
            self._batch = pretraining.put_batch(subject.checked, next(batches))
        self._in_flight: list[Any] = []
        self.count = 0

    def advance(self, count: int) -> None:
        for _ in range(count):
            self._step(self._batch)
        self.wait()

    def feed(self, batches: Iterator[pretraining.Batch]) -> None:
        """One step as the training loop does it: the next batch is placed while devices work."""
        self._step(pretraining.put_batch(self._subject.checked, next(batches)))
        if len(self._in_flight) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self._in_flight.pop(0))

    def wait(self) -> None:
        jax.block_until_ready(self._in_flight)
        del self._in_flight[:-1]

    def loss(self) -> float:
        total, count = jax.device_get(self._in_flight[-1]["loss"])
        return float(total / count)

    def _step(self, batch) -> None:
        self._state, metrics = self._subject.step(self._state, batch)
        self._in_flight.append(metrics)
        self.count += 1


def _clips_per_second(
    turn: Callable[[], Any],
    batch_size: int,
    seconds: float,
    clock: Clock,
    wait: Callable[[], None] = lambda: None,
) -> float:
    """The rate of turns, after some that use up what was read ahead or compiled."""
    for _ in range(4):
        turn()
    wait()
    start, turns = clock(), 0
    while turns < LEAST_SAMPLES or clock() - start < seconds:
        turn()
        turns += 1
    wait()
    return turns * batch_size / (clock() - start)


@contextmanager
def _stream(checked: Run) -> Iterator[Iterator[pretraining.Batch]]:
    batches = pretraining.train_stream(checked)
    try:
        yield batches
    finally:
        batches.close()
