"""Decodes audio files in several processes, in order; a decoder that dies takes one file along."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from maeast_jax.data import audio

_DIED = "its decoder died (crashed, or out of memory)"
_MOST_DEATHS = 10  # in a row; so many files of a kind may be broken, but a machine's memory is less


class DecoderDiedError(OSError):
    """Decoding processes are killed whatever they decode, as for want of memory."""


class DecodePool:
    """Processes that decode; a context manager, which ends them."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._executor = self._start_executor()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *exc_info) -> None:
        self._executor.shutdown(cancel_futures=True)

    def decode(self, paths: Sequence[str]) -> Iterator[np.ndarray | str]:
        """Yields for each path int16 [samples] at 16 kHz, or why it is undecodable, in order.

        Only so many files are under way that the processes stay busy: results wait in memory.
        Where a process dies, the files under way are decoded again one at a time, until the one
        that kills is known; that is undecodable, and the others go on.

        Raises:
          DecoderDiedError: processes die that have no file yet, or on ten files in a row.
        """
        pending = collections.deque()  # (path, future, or None where it is to be decoded alone)
        rest = iter(paths)
        deaths = 0
        while True:
            if all(future for _, future in pending):
                for path in itertools.islice(rest, 4 * self._num_processes - len(pending)):
                    pending.append((path, self._submit(path)))
            if not pending:
                return
            path, future = pending.popleft()
            try:
                result = (future or self._submit(path)).result()
                deaths = 0
            except BrokenProcessPool:
                self._restart(path)
                if future:  # which of those under way it was is not known
                    pending.appendleft((path, future))
                    pending = collections.deque((p, _unless_broken(f)) for p, f in pending)
                    continue
                deaths += 1
                if deaths == _MOST_DEATHS:
                    raise DecoderDiedError(
                        f"decoding processes died on {deaths} files in a row, the last of them"
                        f" {path}: take them out, or, if memory ran out, free some"
                    ) from None
                result = _DIED
                pending = collections.deque((p, f or self._submit(p)) for p, f in pending)
            yield result

    def _start_executor(self) -> concurrent.futures.Executor:
        # Not forked: TensorFlow's threads may hold locks that a forked child would wait for.
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(self._num_processes, context, _start)

    def _submit(self, path: str) -> concurrent.futures.Future:
        try:
            return self._executor.submit(_decode, path)
        except BrokenProcessPool as error:  # since the last result was taken
            future = concurrent.futures.Future()
            future.set_exception(error)
            return future

    def _restart(self, path: str) -> None:
        """Replaces the processes; DecoderDiedError where a new one does not live without a file."""
        self._executor.shutdown()
        self._executor = self._start_executor()
        try:
            self._executor.submit(int).result()
        except BrokenProcessPool:
            raise DecoderDiedError(
                f"a decoding process died at {path}, and so did a new one without a file: if"
                " memory ran out, free some, or pass a smaller --num_processes"
            ) from None


def _unless_broken(future: concurrent.futures.Future) -> concurrent.futures.Future | None:
    return None if isinstance(future.exception(), BrokenProcessPool) else future


def num_cores() -> int:
    """Those that this process may use, which are fewer than the machine's in a batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _decode(path: str) -> np.ndarray | str:
    try:
        return audio.decode(path)
    except audio.UndecodableError as error:
        return error.reason
    except MemoryError:
        os._exit(1)  # as if killed for it: there may be enough for this file alone


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # killed, it cannot end its children, which would wait for work for ever

    threading.Thread(target=follow_parent, daemon=True).start()
