"""Sides of a comparison, each in a process of its own, that work in turn: for beside_*.py.

In one process the thread pools of torch, TensorFlow and XLA would fight for the cores. One side
after the other, a machine that slows down for a while would slow one of them.
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
    """A side's process failed; the message names it and says what it raised."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a side's process is ready to do.

    Attributes:
      run: does so many pieces of it, finished when it returns.
      facts: what the side says of itself; pickled.
      device_bytes: the most memory held on the accelerator so far, None where there is none.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    device_bytes: Callable[[], int | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of one turn, of all the process' cores over it, and of these while it waited."""

    seconds: float
    cpu_seconds: float
    waited_seconds: float
    waited_cpu_seconds: float


class Side:
    """A process that builds its work at once and then works on command.

    build: a function of a module, called in the process with `settings`; it imports what it needs,
      so that a side measures no other side's libraries.
    cpus: the cores that the process may use, None for all; set before anything is imported.
    environment: variables of the process beside this one's, there from its start.
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
        """Does `count` pieces of work and keeps how long they took in `turns`."""
        self._pipe.send(count)
        self.turns.append(Turn(*self._answer()))

    def close(self) -> int:
        """Ends the process; the most bytes it held: on the accelerator, else in memory (VmHWM)."""
        self._pipe.send(None)
        peak_bytes = self._answer()
        self._process.join()
        return peak_bytes

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def waiting_load(self) -> float:
        """Cores that the side kept busy while others worked."""
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
    """Ends the processes of the sides that are in the list when the block is left, however."""
    try:
        yield
    finally:
        for side in sides:
            side.kill()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A process that starts meanwhile has them; what was set before is set again."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def take_turns(sides: Sequence[Side], rounds: int, count: int) -> None:
    """`rounds` times one turn each, `count` pieces of work a turn."""
    for _ in range(rounds):
        for side in sides:
            side.turn(count)


def rates(side: Side, amount: float) -> np.ndarray:
    """Per second, a turn each, where a turn does `amount`."""
    return amount / np.array([turn.seconds for turn in side.turns])


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return float(middle), float(low), float(high)


def positive(text: str) -> int:
    """A number from the command line."""
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
