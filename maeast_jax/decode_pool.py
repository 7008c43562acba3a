"""Decodes audio files in several processes, in order."""

import collections
import concurrent.futures.process
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from maeast_jax import audio


class DecoderDiedError(OSError):
    """A decoding process was killed: by a decoder that crashed, or for want of memory."""


class DecodePool:
    """Processes that decode; a context manager, which ends them."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        # Not forked: TensorFlow's threads may hold locks that a forked child would wait for.
        context = multiprocessing.get_context("spawn")
        self._executor = concurrent.futures.ProcessPoolExecutor(num_processes, context, _start)

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *exc_info) -> None:
        self._executor.shutdown(cancel_futures=True)

    def decode(self, paths: Sequence[str]) -> Iterator[np.ndarray | str]:
        """Yields for each path int16 [samples] at 16 kHz, or why it is undecodable, in order.

        Only so many files are under way that the processes stay busy: results wait in memory.

        Raises:
          DecoderDiedError: naming the file that was next.
        """
        pending = collections.deque()
        rest = iter(paths)
        path = None
        try:
            while True:
                for path in itertools.islice(rest, 4 * self._num_processes - len(pending)):
                    pending.append((path, self._executor.submit(_decode, path)))
                if not pending:
                    return
                path, future = pending.popleft()
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise DecoderDiedError(
                f"a decoding process died on {path} or one of the {len(pending)} files after it:"
                " take the file out, or, if memory ran out, pass a smaller --num_processes"
            ) from None


def num_cores() -> int:
    """Those that this process may use, which are fewer than the machine's in a batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _decode(path: str) -> np.ndarray | str:
    try:
        return audio.decode(path)
    except audio.UndecodableError as error:
        return error.reason


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # killed, it cannot end its children, which would wait for work for ever

    threading.Thread(target=follow_parent, daemon=True).start()
