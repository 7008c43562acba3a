"""A directory that is built aside, by one process at a time, and appears whole or not at all.

On gs:// there is no lock, and a data set is there once its last object is.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from maeast_jax.runtime import bucket, storage

_STAGING_PREFIX = "incomplete."
_ASIDE_PREFIX = "replaced."
_LOCK = "lock"
_OPENER = "dataset_info.json"  # without which no data set opens


class DataError(ValueError):
    """A data set that cannot be written or opened; one line that says what to do about it."""


@contextlib.contextmanager
def locked(target: Path, wait: bool) -> Iterator[None]:
    """Makes the parent of `target` and holds the lock on its file, which ends with the process.

    Whoever has it finds the parent without what killed builds have left. The lock is removed
    afterwards, and the parent where it is empty: the build failed and nothing was there. On gs://
    nothing is made or held.

    Args:
      wait: for another process that builds there; else that is a DataError.
    """
    if storage.is_remote(target):
        yield
        return
    home = target.parent
    path = home / _LOCK
    while True:
        home.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "w")  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            continue  # the process that held the lock has just removed `home`
        with file:
            _lock(file, home, wait)
            if not _is_at(file, path):
                continue  # the process that held it has removed it: the next one makes another
            try:
                _clear(target)
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    home.rmdir()
            return


def directory(target: Path) -> tempfile.TemporaryDirectory:
    """A context manager: a directory beside `target` that nothing opens, removed at its end."""
    return tempfile.TemporaryDirectory(
        prefix=_STAGING_PREFIX, dir=target.parent, ignore_cleanup_errors=True
    )


@contextlib.contextmanager
def adding(staged: Path) -> Iterator[Path]:
    """A folder of this machine to put more files of `staged` into: itself, where it is one."""
    if storage.is_remote(staged):
        with bucket.writing(staged) as here:
            yield here
    else:
        yield staged


def publish(staged: Path, target: Path) -> None:
    """Renames `staged` to `target`, which it replaces where there is one.

    Killed between the renames, neither opens, but both are complete: the next to take the lock
    brings the old back. On gs:// it is copied, and killed on the way the old is gone; the new is
    still staged, to be published again.
    """
    if storage.is_remote(target):
        _publish_objects(staged, target)
        return
    aside = _aside(target)
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    if aside.exists():
        shutil.rmtree(aside)


def is_there(target: Path) -> bool:
    """Whether `target` exists, or will once the remains of a killed `publish` are cleared."""
    if storage.is_remote(target):
        return (target / _OPENER).exists()
    return target.exists() or _aside(target).exists()


def others(target: Path) -> list[str]:
    """Directories beside `target` that are no build's, sorted."""
    names = {path.name for path in target.parent.glob("*") if path.is_dir()}
    names -= {target.name, _aside(target).name}
    return sorted(name for name in names if not name.startswith(_STAGING_PREFIX))


def _publish_objects(staged: epath.Path, target: epath.Path) -> None:
    (target / _OPENER).unlink(missing_ok=True)
    bucket.remove(target)
    names = [name.removeprefix(f"{staged}/") for name in bucket.listing(staged)]
    for part in ([name for name in names if name != _OPENER], [_OPENER]):
        bucket.copy([str(staged / name) for name in part], [str(target / name) for name in part])


def _aside(target: Path) -> Path:
    return target.with_name(_ASIDE_PREFIX + target.name)


def _lock(file, home: Path, wait: bool) -> None:
    if storage.try_lock(file):
        return
    if not wait:
        raise DataError(f"another process is building {home}: wait for it, or choose another name")
    print(f"another process is building {home}: waiting for it", flush=True)
    fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _clear(target: Path) -> None:
    """Removes what killed builds have left; whoever holds the lock knows that none is running."""
    for leftover in target.parent.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover)
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(target)
