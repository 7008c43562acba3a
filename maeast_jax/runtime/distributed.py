"""Several processes of one run: how they find each other, what they agree on, how they end.

Every process runs the same program on its own rows of the batch; only the first one writes logs and
prints. With a single process every function here is a no-op.
"""

import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from maeast_jax.runtime import terminal
from maeast_jax.runtime.cli import PeerLostError, catching

# The other processes take a process for dead, and end, after it was silent for this long.
HEARTBEAT_SECONDS = int(os.environ.get("MAEAST_JAX_HEARTBEAT_SECONDS", "30"))
# An exchange that failed because a process is gone says one of these words: jax's status codes, and
# the libraries that connect CPUs and GPUs.
_WORDS_OF_LOSS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL")


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of the run. Call it before anything else touches a device.

    Args:
      coordinator: HOST:PORT of the first process. None finds all three values from the cluster (a
        TPU pod, SLURM, Kubernetes, Open MPI).
      num_processes: The number of processes; with `coordinator`.
      process_id: The number of this process, from 0; with `coordinator`.

    Raises:
      ValueError: jax knows no cluster here, or the values do not fit together.
      PeerLostError: the other processes did not come.
    """
    if coordinator and ":" not in coordinator:
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, of the first process")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # Detection would also choose devices; an explicit start keeps all of them.
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        is_silent = not is_first()  # this starts the devices of all processes
    except ValueError as error:
        raise ValueError(
            f"{error} Pass --coordinator=HOST:PORT --num_processes=N --process_id=I, or "
            "--distributed alone on a cluster that jax knows"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = terminal.one_line(error)
        raise PeerLostError(f"could not join the other processes ({reason})") from error
    if jax.process_count() == 1:
        # jax has caught SIGTERM for `stopping`, which asks jax only where there are several
        # processes. Until the loop catches it, SIGTERM ends the program.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if is_silent:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115


def is_first() -> bool:
    """Whether this process is the first, which writes logs."""
    return jax.process_index() == 0


@contextmanager
def others_alive() -> Iterator[None]:
    """Raises PeerLostError where an exchange with the other processes fails because one is gone.

    Use it around exchanges only: a compiled step, waiting for its results, saving and restoring a
    checkpoint. Around a whole program it would take an unrelated error, such as the name of a
    missing data set, for the loss of a process. All other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        loss = _loss(error) if jax.process_count() > 1 else None
        if loss is None:
            raise
        raise PeerLostError(
            f"another process of this run is gone ({terminal.one_line(loss)}); the same command "
            "goes on from the newest checkpoint"
        ) from error


def _loss(error: BaseException | None) -> BaseException | None:
    """Returns the first error, among `error` and its causes, that tells of a lost process.

    jax raises JaxRuntimeError where an exchange begins and ValueError where its result is waited
    for. Orbax raises TimeoutError where a save waits in vain.
    """
    while error is not None:
        text = str(error)
        is_of_exchange = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        has_words = any(word in text for word in _WORDS_OF_LOSS)
        is_loss = is_of_exchange and has_words and "RESOURCE_EXHAUSTED" not in text
        if is_loss or isinstance(error, TimeoutError):
            return error
        error = error.__cause__ or error.__context__
    return None


def agree(what: str, value: object) -> None:
    """Raises ValueError, in every process, where the processes differ in a JSON value."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    with others_alive():
        everyone = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (everyone != everyone[:1]).any():
        raise ValueError(
            f"the processes of this run differ in {what}: start all of them by the same command, "
            "on the same files"
        )


def from_first(value: int) -> int:
    """Returns the first process' whole number (or bool) in every process."""
    if jax.process_count() == 1:
        return value
    with others_alive():
        return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(value: bool) -> bool:
    """Returns, in every process, whether `value` is true in all of them."""
    if jax.process_count() == 1:
        return value
    with others_alive():
        return bool(multihost_utils.process_allgather(np.bool_(value)).all())


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the signal that asked the run to stop, or None.

    All processes get the same answer at the same call, whichever of them was signalled, so all save
    the same step; they must call it at the same places. In a single process a second Ctrl-C raises
    KeyboardInterrupt at once. Outside of the main thread no signal is noted. The signals are
    SIGTERM, SIGINT, SIGUSR1, which `sbatch --signal=USR1` sends, and SIGHUP, which a closed SSH
    window sends. The last two stay ignored where they are, as SIGHUP is after nohup.
    """
    asking = (signal.SIGHUP, signal.SIGUSR1)
    others = [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]
    others.append(signal.SIGINT)
    if jax.process_count() == 1:
        caught: list[int] = []

        def catch(number: int, _) -> None:
            if caught and number == signal.SIGINT:
                raise KeyboardInterrupt
            caught.append(number)

        with catching(catch, signal.SIGTERM, *others):
            yield lambda: caught[0] if caught else None
        return
    calls, stopped = itertools.count(), []

    def asked() -> int | None:
        with others_alive():
            if not stopped and multihost_utils.reached_preemption_sync_point(next(calls)):
                stopped.append(signal.SIGTERM)
        return stopped[0] if stopped else None

    # jax has caught SIGTERM since `initialize`; the others join it.
    with catching(lambda *_: os.kill(os.getpid(), signal.SIGTERM), *others):
        yield asked
