"""Clips a second and the time left, from the clock."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Pace:
    """How fast a run trains, and how long it has left.

    Evaluations are no part of the rate; of the time left they are, each as long as the last one.
    """

    def __init__(
        self,
        batch_size: int,
        total_steps: int,
        eval_every: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`batch_size` is the global one: the clips of a step; `clock` gives seconds."""
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._eval_every = eval_every
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._steps = 0
        self._seconds = 0.0
        self._eval_seconds = 0.0

    def rate(self, step: int) -> float | None:
        """Clips a second since the last call; None at the first, or where no step has passed.

        The first call starts the clock: what came before pays for the compilation.
        """
        last, self._last = self._last, (step, self._clock())
        if last is None or step <= last[0] or self._last[1] <= last[1]:
            return None
        steps, seconds = step - last[0], self._last[1] - last[1]
        self._steps += steps
        self._seconds += seconds
        return self._batch_size * steps / seconds

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation."""
        began = self._clock()
        yield
        self._eval_seconds = self._clock() - began
        if self._last is not None:
            self._last = (self._last[0], self._last[1] + self._eval_seconds)

    def seconds_left(self, step: int) -> float | None:
        """For what comes after `step`, the evaluation at that step included; None before a rate."""
        if not self._steps:
            return None
        evaluations = self._total_steps // self._eval_every - (step - 1) // self._eval_every
        evaluations += self._total_steps % self._eval_every > 0
        steps_seconds = (self._total_steps - step) * self._seconds / self._steps
        return steps_seconds + evaluations * self._eval_seconds
