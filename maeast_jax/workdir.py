"""A run's folder as all its processes see it: whose it is, and which checkpoint is the newest."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from maeast_jax import checkpoint
from maeast_jax.runtime import distributed as hosts
from maeast_jax.runtime import storage as paths

# A network file system may show a host what a folder held a minute ago (NFS: acdirmax, 60 s), and
# keeps the lock of a host that died until its lease ends (NFSv4: 90 s).
_SETTLING_SECONDS = 150
_POLL_SECONDS = 1.0


def newest_step(workdir: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint that any process of the run sees, once all see it.

    Raises ValueError, in every process, where one does not come to see it.
    """

    def seen() -> int:
        return max(checkpoint.saved_steps(workdir), default=-1)

    newest = hosts.largest(seen())
    if not hosts.all_true(_settles(lambda: seen() == newest)):
        raise ValueError(
            f"the processes of this run see different checkpoints in {workdir}: give a --workdir "
            "that all hosts share"
        )
    return newest if newest >= 0 else None


@contextmanager
def held(workdir: os.PathLike) -> Iterator[None]:
    """Holds a workdir for this run, whose processes all see it.

    The lock is on an open file, so it ends with its process, the run's first, however that ends;
    where a file system has no locks, and on gs://, nothing keeps two runs apart.

    Raises ValueError where another run is at work in it; in every process, where the hosts have
    each a folder of their own by that name.
    """
    if paths.is_remote(workdir):
        yield
        return
    path = Path(workdir) / "lock"
    if not hosts.is_first():
        _check_shared(path, 0)
        yield
        return
    with path.open("a") as file:
        _take(file, path.parent)
        nonce = secrets.randbits(30)
        file.truncate(0)
        file.write(str(nonce))
        file.flush()
        _check_shared(path, nonce)
        yield


def _take(file, workdir: Path) -> None:
    if paths.try_lock(file):
        return
    # Of a run on several hosts it may be the lock of the one that was lost.
    if hosts.is_joined():
        print(f"another process holds {workdir}: waiting {_SETTLING_SECONDS} s for it", flush=True)
        if _settles(lambda: paths.try_lock(file)):
            return
    raise ValueError(
        f"another process is training in {workdir}; wait for it or choose another --workdir"
    )


def _check_shared(path: Path, nonce: int) -> None:
    """Waits until all processes read the first one's `nonce` in the file at `path`."""
    wanted = str(hosts.from_first(nonce))
    if not hosts.all_true(_settles(lambda: path.exists() and path.read_text() == wanted)):
        raise ValueError(
            f"not every host sees what the first one writes to {path.parent}: give a --workdir "
            "that all of them share, or one on gs://"
        )


def _settles(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + _SETTLING_SECONDS
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
