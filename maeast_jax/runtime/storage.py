"""Files and folders on this machine or on Google Cloud Storage (`gs://BUCKET/...`), by epath.

An object on gs:// is written whole or not at all; objects cannot be appended to, renamed or locked.
The libraries that reach gs:// raise many kinds of errors; `reaching` turns each into one line.
"""

import fcntl
import glob
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

_INSTALL = "pip install gcsfs"  # brings google-cloud-storage along
# Google allows one write per second to an object, and the run waits for each write.
_REWRITE_SECONDS = 30.0


def path(name: str | os.PathLike) -> epath.Path:
    """Returns `name` as a path, `~` expanded; ValueError for an address other than gs://."""
    text = os.fspath(name)
    if is_remote(text):
        if not text.startswith("gs://"):
            raise ValueError(f"{text} is unknown: name a folder of this machine or gs://BUCKET/...")
        # A kept listing would hide the objects that other processes and tensorstore add later.
        import fsspec

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text).expanduser()


def absolute(name: str | os.PathLike) -> epath.Path:
    """Returns `name` as an absolute path; Orbax takes no others."""
    found = path(name)
    # epath's absolute() would put the working directory before gs://.
    return found if is_remote(found) else found.absolute()


def is_remote(name: str | os.PathLike) -> bool:
    """Returns whether `name` is an address, not a file or folder of this machine."""
    return "://" in os.fspath(name)


def check_local(name: str | os.PathLike) -> None:
    """Raises ValueError where `name` is not a file or folder of this machine."""
    if is_remote(name):
        raise ValueError(
            f"{name} must be on this machine; copy from or to gs:// with gcloud storage cp"
        )


def check_output(file: Path, overwrite: bool) -> None:
    """Raises ValueError, in one line, if a program cannot write its `--output` there."""
    if file.exists() and not overwrite:
        raise ValueError(f"--output={file} exists: choose another name, or pass --overwrite")
    if not file.parent.is_dir():
        raise ValueError(f"--output={file}: {file.parent} is not a folder; make it first")
    make_writable(path(file.parent), "--output")


@contextmanager
def whole(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `target` to write a file or a folder at; on exit it is renamed.

    Readers find the old `target` or the new one, never half of one, even after a kill. After an
    exception the path is removed; what a killed process left is removed by the next process that
    writes the same `target` here.

    Raises OSError where `target` is a folder that is not empty.
    """
    target = Path(target)
    for left in target.parent.glob(f".*.partial.{glob.escape(target.name)}"):
        if not _is_running(left.name.split(".")[1]):
            _remove(left)
    # The suffix of `target` stays last: some libraries append their own where it is missing.
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        _remove(partial)


def write_whole(file: str | os.PathLike, data: bytes) -> None:
    """Writes a file, on this machine or on gs://; readers find all of it or the old one."""
    if is_remote(file):
        path(file).write_bytes(data)  # an object appears whole
        return
    with whole(file) as partial:
        partial.write_bytes(data)


def _remove(name: Path) -> None:
    if name.is_dir():
        shutil.rmtree(name)
    else:
        name.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        pass
    return True


def stamp(name: str | os.PathLike) -> tuple[int, int]:
    """Returns a file's size in bytes and time of change in ns, which a replaced file changes.

    Both are 0 where the file is missing on this machine; ValueError where it is on gs://.
    """
    if is_remote(name):
        with reaching(name):
            status = path(name).stat()
        return status.length, status.mtime * 1_000_000_000
    try:
        status = os.stat(name)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def make_writable(folder: epath.Path, flag: str) -> None:
    """Makes a folder; raises ValueError, which names `flag`, where it cannot be written."""
    probe = folder / f".writable-{uuid.uuid4().hex}"  # several hosts may try at once
    remedy = f"choose another {flag}"
    try:
        with reaching(folder, "written", remedy):
            if is_remote(folder):
                from google.cloud import storage

                storage.Client()  # without credentials it raises; gcsfs would try for a minute
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
    """Turns every error of the libraries that reach gs:// into a ValueError of one line.

    Where `name` is on this machine, errors pass unchanged.

    Args:
      name: the address, for the message.
      done: the participle in "cannot be ...".
      remedy: the end of the message.
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
        raise ValueError(f"{name} needs gcsfs: {_INSTALL} ({terminal.one_line(error)})") from error
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "no such bucket or object" if is_missing else terminal.one_line(error)
        raise ValueError(f"{name} cannot be {done} ({reason}); {remedy}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries that read files, which also log pages about each error they raise."""
    loggers = [logging.getLogger(name) for name in ("gcsfs", "google.auth", "absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def try_lock(file: IO) -> bool:
    """Locks an open file of this machine; returns False where another process holds the lock.

    Returns True where the file system has no locks, as some network file systems.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class Rewritten:
    """A file on gs:// that grows by lines: the whole object is written again every half minute."""

    def __init__(self, path: epath.Path, data: bytes, clock: Callable[[], float]):
        """Starts from `data`, which the object holds already; `clock` returns seconds."""
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
