"""The training loop of pretraining and fine-tuning: steps, metrics, evaluations, checkpoints.

The order within an iteration makes resuming exact. At the top of step i the state has seen i
batches; it is saved there, before the next batch is taken. A run that goes on from step i therefore
asks its stream for batch i, and needs no saved iterator.
"""

import bisect
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from maeast_jax.checkpoint import Checkpoints
from maeast_jax.runtime import distributed, terminal
from maeast_jax.runtime.cli import Interrupted, NonFiniteError, PeerLostError
from maeast_jax.training.metrics_writer import MetricsWriter
from maeast_jax.training.steps import DeviceBatch, Metrics

# Steps that the host hands to the devices ahead of the one they work on: enough to keep the devices
# busy, few enough that the batches of these steps do not fill their memory.
STEPS_IN_FLIGHT = 2


class State(Protocol):
    """What the loop needs of a training state; it is a pytree."""

    def parts(self) -> dict[str, Any]:
        """Returns the state as the parts of a checkpoint."""


S = TypeVar("S", bound=State)
# Returns the signal that asked the run to stop, or None; every process calls it at the same places.
AskedToStop = Callable[[], int | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      state: the state to go on with; fine-tuning keeps its best weights in it.
      values: one line of metrics.jsonl; empty where there is nothing to evaluate on.
      pictures: uint8 [height, width, 3] by name.
    """

    state: Any
    values: dict[str, float]
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop does what; all fields but `batch_size` are step numbers, ascending.

    The last step is logged, evaluated and saved in any case.
    """

    start_step: int
    total_steps: int
    batch_size: int  # clips per step over all devices
    log_steps: Sequence[int]
    eval_steps: Sequence[int]
    checkpoint_steps: Sequence[int]


def run(
    state: S,
    step: Callable[[S, DeviceBatch], tuple[S, Metrics]],
    batches: Iterator[DeviceBatch],
    evaluate: Callable[[S, AskedToStop], Evaluation | None],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    config: LoopConfig,
) -> tuple[S, dict[str, float]]:
    """Trains to the last step; returns the last state and the values of the last evaluation.

    Args:
      state: the state after `config.start_step` steps; its buffers may be donated to `step`.
      step: (state, batch) -> (state, metrics), compiled; metrics are (sum, count) pairs.
      batches: on the devices, from `config.start_step` on.
      evaluate: returns None where it was interrupted.
      checkpoints: closed in any case.
      writer: closed in any case.

    Raises:
      Interrupted: after saving, on SIGTERM or Ctrl-C.
      NonFiniteError: a loss or gradient norm is not finite; no state past it is saved.
      PeerLostError: another process of the run is gone.
      ValueError: the batches ended early.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        stream = stack.enter_context(contextlib.closing(batches))
        progress = stack.enter_context(_progress(config))
        stack.push(_closing(checkpoints))
        asked_to_stop = stack.enter_context(distributed.stopping())
        log = _Log(writer, progress, Pace(config), checkpoints)
        values: dict[str, float] | None = {}
        if config.start_step in config.eval_steps or config.start_step == config.total_steps:
            # The run before may have been interrupted in this evaluation.
            state, values = log.evaluate(state, config.start_step, evaluate, asked_to_stop)
        for number in range(config.start_step, config.total_steps):
            # Ask once per step: a signal between two calls would raise Interrupted without a save.
            signal_number = asked_to_stop()
            if signal_number:
                log.catch_up(number)
                progress.say(f"asked to stop: saving step {number}")
            if signal_number or (number > config.start_step and number in config.checkpoint_steps):
                log.save(state, number)
            if signal_number:
                checkpoints.wait()
                raise Interrupted(signal_number, number)
            batch = next_batch(stream, number)
            with distributed.others_alive():
                state, metrics = step(state, batch)
            log.add(number + 1, metrics)
            is_last = number + 1 == config.total_steps
            if is_last or number + 1 in config.log_steps:
                log.close_interval(number + 1)
            if is_last or number + 1 in config.eval_steps:
                state, values = log.evaluate(state, number + 1, evaluate, asked_to_stop)
        log.save(state, config.total_steps)
        checkpoints.wait()
        if (signal_number := asked_to_stop()) and values is None:
            # The same command then runs the evaluation that was cut short.
            raise Interrupted(signal_number, config.total_steps)
    return state, values


class Pace:
    """How fast a run trains, and how long it has left.

    Evaluations are no part of the rate. The time left includes those to come, each as long as the
    last one.
    """

    def __init__(self, config: LoopConfig, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds."""
        self._config = config
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._steps = 0
        self._seconds = 0.0
        self._eval_seconds = 0.0

    def rate(self, step: int) -> float | None:
        """Returns clips per second since the last call; None at the first, or without a step since.

        The first call starts the clock, so that the rate leaves out the compilation.
        """
        last, self._last = self._last, (step, self._clock())
        if last is None or step <= last[0] or self._last[1] <= last[1]:
            return None
        steps, seconds = step - last[0], self._last[1] - last[1]
        self._steps += steps
        self._seconds += seconds
        return self._config.batch_size * steps / seconds

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Takes the time of an evaluation."""
        began = self._clock()
        yield
        self._eval_seconds = self._clock() - began
        if self._last is not None:
            self._last = (self._last[0], self._last[1] + self._eval_seconds)

    def seconds_left(self, step: int) -> float | None:
        """Returns the time left after `step`, its own evaluation included; None before a rate."""
        if not self._steps:
            return None
        total, eval_steps = self._config.total_steps, self._config.eval_steps
        ahead = len(eval_steps) - bisect.bisect_left(eval_steps, step) + (total not in eval_steps)
        return (total - step) * self._seconds / self._steps + ahead * self._eval_seconds


class _Log:
    """Writes metrics once the devices have computed them; evaluates and saves only after that."""

    def __init__(
        self,
        writer: MetricsWriter,
        progress: terminal.Progress,
        pace: Pace,
        checkpoints: Checkpoints,
    ):
        self._writer = writer
        self._progress = progress
        self._pace = pace
        self._checkpoints = checkpoints
        # Steps since the last line, and intervals that ended but are still on the devices.
        self._interval: list[tuple[int, Metrics]] = []
        self._closed: list[tuple[int, float | None, list[tuple[int, Metrics]]]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just handed to the devices."""
        self._interval.append((step, metrics))
        if len(self._interval) > STEPS_IN_FLIGHT:
            with distributed.others_alive():
                jax.block_until_ready(self._interval[-1 - STEPS_IN_FLIGHT])

    def close_interval(self, step: int) -> None:
        """Ends the interval here and writes the one before, so that the devices never wait."""
        self._closed.append((step, self._pace.rate(step), self._interval))
        self._interval = []
        if len(self._closed) > 1:
            self._write(*self._closed.pop(0))

    def catch_up(self, step: int) -> None:
        """Writes a line for every step so far; waits for the devices."""
        if self._interval:
            self.close_interval(step)
        self._flush()

    def save(self, state: State, step: int) -> None:
        """Starts to save a state whose metrics are all written, and all finite."""
        # Lines for steps up to a checkpoint are on the disk before it is: a kill loses none.
        self.catch_up(step)
        self._writer.flush()
        self._checkpoints.save(step, state.parts())

    def evaluate(
        self, state: S, step: int, evaluate: Callable, asked_to_stop: AskedToStop
    ) -> tuple[S, dict[str, float] | None]:
        """Returns the state to go on with and the values; these are None after an interruption."""
        self.catch_up(step)
        if distributed.from_first(self._writer.has(step, "eval")):
            return state, {}
        with self._pace.evaluation():
            found = evaluate(state, asked_to_stop)
        if found is None:
            return state, None
        for name, picture in found.pictures.items():
            self._writer.picture(step, name, picture)
        if found.values:
            self._writer.write(step, "eval", found.values)
            self._writer.flush()
            self._writer.draw_curves()
            names = sorted(found.values, key=lambda name: name != "loss")
            terms = (f"{name} {found.values[name]:.4f}" for name in names)
            self._progress.say(f"step {step}: held-out {', '.join(terms)}")
        return found.state, found.values

    def _flush(self) -> None:
        while self._closed:
            self._write(*self._closed.pop(0))

    def _write(self, step: int, clips_per_second: float | None, interval) -> None:
        with distributed.others_alive():
            fetched = jax.device_get(interval)
        self._check_finite(fetched)
        row = means([metrics for _, metrics in fetched])
        row["learning_rate"] = means([fetched[-1][1]])["learning_rate"]
        if clips_per_second is not None:
            row["clips_per_second"] = clips_per_second
        self._writer.write(step, "train", row)
        left = self._pace.seconds_left(step)
        self._progress.update(step, row["loss"], clips_per_second, left)

    def _check_finite(self, fetched: list[tuple[int, Metrics]]) -> None:
        for step, metrics in fetched:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name][0]):
                    last = self._checkpoints.latest_step()
                    kept = "no checkpoint yet" if last is None else f"step {last} is saved"
                    raise NonFiniteError(
                        f"{name} is {float(metrics[name][0])} at step {step} ({kept}); lower "
                        "optimizer.learning_rate or raise warmup_steps"
                    )


def means(metrics: list[Metrics]) -> dict[str, float]:
    """Returns the (sum, count) pairs of several batches as one mean each."""
    return {
        name: math.fsum(m[name][0] for m in metrics) / math.fsum(m[name][1] for m in metrics)
        for name in metrics[0]
    }


@contextlib.contextmanager
def _progress(config: LoopConfig) -> Iterator[terminal.Progress]:
    """The progress display; of several processes only the first one shows it."""
    with open(os.devnull, "w") as nowhere:
        stream = None if distributed.is_first() else nowhere
        progress = terminal.Progress(config.total_steps, config.start_step, stream)
        try:
            yield progress
        finally:
            progress.close()


def _closing(checkpoints: Checkpoints) -> Callable:
    """Returns an exit function that closes the checkpoints and hides no earlier exception."""

    def close(kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            checkpoints.close()
        elif not issubclass(
            kind, PeerLostError
        ):  # else close() would wait for the lost process for ever
            with contextlib.suppress(Exception):
                checkpoints.close()

    return close


def next_batch(batches: Iterator[DeviceBatch], step: int) -> DeviceBatch:
    """Returns the batch of a step; raises ValueError where there is none."""
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended before step {step}; give an endless iterator or lower total_steps"
        ) from None
