"""Sides of a comparison for beside_*.py: each works in a process of its own, and they take turns.

In one process the thread pools of torch, TensorFlow and XLA would compete for the cores. Turns are
short and alternate, because a machine that is slow for a while should slow both sides.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class SideError(Exception):
    """A side's process failed; the message has its name and its error."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that a side's process is ready to do.

    Attributes:
      run: Does the given number of pieces of work, and returns when they are done.
      facts: Properties of the side for its row of the results; pickled.
      device_bytes: Peak memory on the accelerator so far; None without an accelerator.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    device_bytes: Callable[[], int | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Turn:
    """Times of one turn: wall and CPU seconds of the turn, and of the wait before it."""

    seconds: float
    cpu_seconds: float
    waited_seconds: float
    waited_cpu_seconds: float


class Side:
    """A process that builds its work at once, and then works on command.

    Args:
      name: Name of the side, for results and errors.
      build: A module's function that the process calls with `settings`. It does its own imports, so
        that a side does not measure another side's libraries.
      settings: Arguments of `build`; pickled.
      cpus: Cores that the process may use, None for all; set before anything is imported.
      environment: Variables that the process has in addition to this process' variables.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., Work],
        settings: dict[str, Any],
        cpus: Sequence[int] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self.turns: list[Turn] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build, settings, cpus), name=name, daemon=True
        )
        with _environment(environment or {}):
            self._process.start()
        theirs.close()
        self.facts = self._answer()

    def turn(self, count: int) -> None:
        """Does `count` pieces of work, and appends their times to `turns`."""
        self._pipe.send(count)
        self.turns.append(Turn(*self._answer()))

    def close(self) -> int:
        """Ends the process; returns its peak bytes on the accelerator, else in memory (VmHWM)."""
        self._pipe.send(None)
        peak_bytes = self._answer()
        self._process.join()
        return peak_bytes

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()

    @property
    def waiting_load(self) -> float:
        """Number of cores that the side kept busy while other sides worked."""
        waited = sum(turn.waited_seconds for turn in self.turns)
        return sum(turn.waited_cpu_seconds for turn in self.turns) / waited if waited else 0.0

    def _answer(self):
        try:
            is_failed, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideError(
                f"{self.name}: its process ended with {self._process.exitcode}"
            ) from None
        if is_failed:
            raise SideError(f"{self.name}: {answer}")
        return answer


@contextlib.contextmanager
def ending(sides: list[Side]) -> Iterator[None]:
    """Kills the processes of the sides in the list at the end of the block, also after an error."""
    try:
        yield
    finally:
        for side in sides:
            side.kill()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for processes that start in the block; restores the old values afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def take_turns(sides: Sequence[Side], rounds: int, count: int) -> None:
    """Gives each side one turn of `count` pieces of work, `rounds` times."""
    for _ in range(rounds):
        for side in sides:
            side.turn(count)


def rates(side: Side, amount: float) -> np.ndarray:
    """Returns `amount` per second for each turn, where `amount` is the work of one turn."""
    return amount / np.array([turn.seconds for turn in side.turns])


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """Returns the median, the 10th and the 90th percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return float(middle), float(low), float(high)


def positive(text: str) -> int:
    """Returns a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def _serve(pipe, build: Callable[..., Work], settings: dict[str, Any], cpus) -> None:
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        work = build(**settings)
        pipe.send((False, work.facts))
        ended, ended_cpu = time.perf_counter(), time.process_time()
        while (count := pipe.recv()) is not None:
            start, start_cpu = time.perf_counter(), time.process_time()
            work.run(count)
            waited = (start - ended, start_cpu - ended_cpu)
            ended, ended_cpu = time.perf_counter(), time.process_time()
            pipe.send((False, (ended - start, ended_cpu - start_cpu, *waited)))
        device_bytes = work.device_bytes()
        pipe.send((False, _peak_memory_bytes() if device_bytes is None else device_bytes))
    except Exception:
        pipe.send((True, traceback.format_exc()))


def _peak_memory_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
