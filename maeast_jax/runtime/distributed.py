"""Several processes of one run: how they find each other, what they agree on, how they end.

Every process runs the same program on rows of its own; the first one alone writes logs and speaks.
With one process everything here is at hand without any of it.
"""

import hashlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from maeast_jax.runtime.cli import PeerLostError, catching, stop_signals

# How long a process may be silent before the others take it for dead and end.
HEARTBEAT_SECONDS = 30
_INITIALIZATION_SECONDS = 300
# What errors of an exchange say where another process is gone, be they of jax, or of Orbax, whose
# saves wait for one another.
_SIGNS_OF_LOSS = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "ChainedFuture",
)  # fmt: skip


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the run's processes, before anything else touches a device.

    Args:
      coordinator: HOST:PORT of the first process; None finds all three from the cluster (a TPU
        pod, SLURM, Kubernetes, Open MPI).

    Raises:
      ValueError: no cluster is known here, or the numbers do not fit together.
      PeerLostError: the others did not come.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, of the first process")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # Detection would also choose devices, of which an explicit start keeps all.
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=_INITIALIZATION_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        is_silent = not is_first()  # starts the devices, of all processes
    except ValueError as error:
        if coordinator is not None:
            raise
        raise ValueError(
            f"--distributed: {error}; on a cluster that jax does not know, pass --coordinator="
            "HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = "could not join the other processes"
        if "DEADLINE_EXCEEDED" in str(error):
            reason = f"the other processes did not come within {_INITIALIZATION_SECONDS} s"
        raise PeerLostError(f"{reason} ({_first_line(error)})") from error
    if jax.process_count() == 1:
        # jax has caught SIGTERM for `stopping`, which with one process does not ask jax: until the
        # loop catches it, it ends the program.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if is_silent:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process' life)


def is_joined() -> bool:
    """Whether `initialize` was called, be it with one process."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that logs."""
    return jax.process_index() == 0


def agree(what: str, value: object) -> None:
    """Raises ValueError, in every process, where they differ in a value that JSON holds."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    everyone = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (everyone == everyone[:1]).all():
        return
    raise ValueError(
        f"the processes of this run differ in {what}: start all of them by the same command, on "
        "the same files"
    )


def from_first(value: int) -> int:
    """The first process' whole number (or bool), in every process."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """The largest of all processes' whole numbers, in every process."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def all_true(value: bool) -> bool:
    """Whether it is true in every process, in every process."""
    return largest(not value) == 0


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """A function that gives the signal that asked the run to stop, or None.

    All processes get the same answer at the same call of it, whichever of them was signalled, so
    that all save the same step; so they have to call it at the same places.
    """
    if jax.process_count() == 1:
        with stop_signals() as caught:
            yield lambda: caught[0] if caught else None
        return
    calls, stopped = itertools.count(), []

    def asked() -> int | None:
        if not stopped and multihost_utils.reached_preemption_sync_point(next(calls)):
            stopped.append(signal.SIGTERM)
        return stopped[0] if stopped else None

    # jax has caught SIGTERM since `initialize`; Ctrl-C joins it.
    with catching(lambda *_: os.kill(os.getpid(), signal.SIGTERM), signal.SIGINT):
        yield asked


@contextmanager
def others_alive() -> Iterator[None]:
    """Raises PeerLostError where what is done with other processes fails for want of one.

    Other failures, such as of memory or of a disk, are raised as they are.
    """
    try:
        yield
    except PeerLostError:
        raise
    except Exception as error:
        sign = _sign_of_loss(error) if jax.process_count() > 1 else None
        if sign is None:
            raise
        raise PeerLostError(
            f"another process of this run is gone ({sign}); the same command goes on from the "
            "newest checkpoint"
        ) from error


def _sign_of_loss(error: BaseException | None) -> str | None:
    """The line by which an error, or one that led to it, tells of a lost process.

    By its words: jax raises JaxRuntimeError where an exchange is begun, and ValueError where its
    result is waited for; Orbax TimeoutError.
    """
    while error is not None:
        is_oom = "RESOURCE_EXHAUSTED" in str(error)
        if not is_oom and any(word in str(error) for word in _SIGNS_OF_LOSS):
            return _first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
