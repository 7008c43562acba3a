"""Folders and files of this machine, or of Google Cloud Storage (`gs://BUCKET/...`), by epath.

An object there is written whole or not at all, and only whole: nothing is appended to, renamed or
locked. What goes wrong there comes from several libraries; `reaching` makes one line of it.
"""

import errno
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from etils import epath

from maeast_jax.runtime import terminal

# Brings google-cloud-storage along, which Orbax asks about the bucket.
INSTALL = "pip install gcsfs"
# An object may be written once a second at most, and the run waits for it.
_REWRITE_SECONDS = 30.0


def path(name: str | os.PathLike) -> epath.Path:
    """`name` with `~` expanded. Raises ValueError for an address of another kind than gs://."""
    text = os.fspath(name)
    if is_remote(text):
        if not text.startswith("gs://"):
            raise ValueError(f"{text} is unknown: name a folder of this machine or gs://BUCKET/...")
        # Else a folder that was listed once hides what other processes and tensorstore add to it.
        import fsspec

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text).expanduser()


def absolute(name: str | os.PathLike) -> epath.Path:
    """As `path`, and absolute, as Orbax wants them; epath's own puts this folder before gs://."""
    found = path(name)
    return found if is_remote(found) else found.absolute()


def is_remote(name: str | os.PathLike) -> bool:
    """Whether this is no folder or file of this machine."""
    return "://" in os.fspath(name)


def check_local(name: str | os.PathLike) -> None:
    """Raises ValueError for what only a file or folder of this machine can be."""
    if is_remote(name):
        raise ValueError(
            f"{name} must be on this machine; copy from or to gs:// with gcloud storage cp"
        )


@contextmanager
def whole(target: str | os.PathLike) -> Iterator[Path]:
    """A path on this machine to write a file or a folder at; it becomes `target` at the end.

    A reader, or a kill, meets the old `target` or the new one, never half of one. What is written
    lies beside `target`, so that the last step is a rename; after an exception it is removed.

    Raises OSError where `target` is a folder that is not empty.
    """
    target = Path(target)
    # The suffix stays last: some libraries append their own where it is missing.
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_whole(file: str | os.PathLike, data: bytes) -> None:
    """Writes a file, here or on gs://, so that nobody meets half of it."""
    if is_remote(file):
        path(file).write_bytes(data)  # an object appears whole
        return
    with whole(file) as partial:
        partial.write_bytes(data)


def stamp(name: str | os.PathLike) -> tuple[int, int]:
    """Size and time of change (ns) of a file, by which one that took its place is told.

    Zeros where there is no such file.
    """
    if is_remote(name):
        with reaching(name):
            file = path(name)
            status = file.stat() if file.exists() else None
        return (status.length, status.mtime * 1_000_000_000) if status else (0, 0)
    try:
        status = os.stat(name)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def make_writable(folder: epath.Path, flag: str) -> None:
    """Makes a folder where it is missing; ValueError where it cannot be written, naming `flag`."""
    probe = folder / f".writable-{uuid.uuid4().hex}"  # hosts may share the folder
    remedy = f"choose another {flag}"
    try:
        with reaching(folder, "written", remedy):
            if is_remote(folder):
                _ask_for_bucket(folder)
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({terminal.one_line(error)}); {remedy}"
        ) from error


@contextmanager
def reaching(
    name: str | os.PathLike, done: str = "read", remedy: str = "check the address"
) -> Iterator[None]:
    """Raises ValueError, in one line, for what goes wrong inside with an object store.

    The libraries that reach it share no base class of errors. What goes wrong on this machine is
    raised as it is.
    """
    if not is_remote(name):
        yield
        return
    try:
        with quiet():
            yield
    except ValueError:
        raise
    except ImportError as error:
        raise ValueError(f"{name} needs gcsfs: {INSTALL} ({terminal.one_line(error)})") from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be {done} ({terminal.one_line(error)}); {remedy}"
        ) from error


def try_lock(file: IO) -> bool:
    """Locks an open file of this machine; False where another process has it.

    Some network file systems have no locks, and there it is True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries that reach gs:// log, with a traceback, and raise as well."""
    loggers = [logging.getLogger(name) for name in ("gcsfs", "google.auth")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _ask_for_bucket(folder: epath.Path) -> None:
    """As Orbax will, which has to know whether the bucket has real folders."""
    from google.cloud import storage

    storage.Client().get_bucket(os.fspath(folder).split("/")[2])


class Rewritten:
    """A file that grows by lines, of a store that cannot append: it is written anew at times."""

    def __init__(self, path: epath.Path, data: bytes, clock: Callable[[], float]):
        self._path = path
        self._data = bytearray(data)
        self._flushed = len(data)
        self._clock, self._seconds = clock, clock()

    def write(self, line: bytes) -> None:
        self._data += line
        if self._clock() - self._seconds >= _REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._flushed < len(self._data):
            write_whole(self._path, bytes(self._data))
            self._flushed, self._seconds = len(self._data), self._clock()

    def close(self) -> None:
        self.flush()
