"""What ends a run before its last step: signals, losses that are no numbers, lost processes."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """SIGTERM or Ctrl-C, after the state was saved; `exit_code` is the shell's 128 + signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} at step {step}, which is saved; "
            "the same command goes on from there"
        )
        self.exit_code = 128 + signal_number


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite."""


class PeerLostError(RuntimeError):
    """Another process of the run is gone, and with it what only it held."""


@contextmanager
def catching(catch: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """`catch` handles these signals; nothing does outside of the main thread, where none can be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that holds the signal once SIGTERM or Ctrl-C has come; a second Ctrl-C acts at once.

    Signals can be caught in the main thread only; elsewhere the list stays empty.
    """
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with catching(catch, signal.SIGTERM, signal.SIGINT):
        yield caught
