"""Decodes recordings wherever they lie: those on gs:// are fetched first, a few ahead."""

import collections
import concurrent.futures
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maeast_jax.data import DecodePool
from maeast_jax.runtime import bucket, storage, terminal

_AHEAD = 8


class NotFetched(str):
    """Why a recording that may be there could not be had; another time it may be."""


def decode(pool: DecodePool, names: Sequence[str]) -> Iterator[np.ndarray | str]:
    """Yields what `pool.decode` would if all recordings lay on this machine, in order.

    One on gs:// is a temporary file from shortly before it is decoded until its result is taken.
    Where it cannot be fetched, the reason is yielded: a NotFetched, unless it is not there.

    Raises:
      DecoderDiedError: as there.
      OSError: no room for temporary files.
    """
    if not any(map(storage.is_remote, names)):
        yield from pool.decode(names)
        return
    reasons: dict[str, str] = {}
    files = collections.deque()  # whose results are still to come
    with (
        storage.quiet(),
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(_AHEAD) as threads,
    ):

        def here() -> Iterator[str]:
            rest = iter(enumerate(names))
            ahead = collections.deque()
            while True:
                for index, name in itertools.islice(rest, _AHEAD - len(ahead)):
                    # Decoders go by the suffix too.
                    file = os.path.join(folder, f"{index}{os.path.splitext(name)[1]}")
                    ahead.append((file, threads.submit(_fetch, name, file)))
                if not ahead:
                    return
                file, fetch = ahead.popleft()
                if reason := fetch.result():
                    reasons[file] = reason  # the pool will say that there is no such file
                files.append(file)
                yield file

        for decoded in pool.decode(here()):
            file = files.popleft()
            yield reasons.pop(file, decoded)
            Path(file).unlink(missing_ok=True)


def _fetch(name: str, file: str) -> str | None:
    """Puts a recording into a file; returns why not."""
    try:
        if storage.is_remote(name):
            bucket.fetch(name, Path(file))
        else:
            os.symlink(os.path.abspath(name), file)
    except FileNotFoundError:
        return "not found"
    except ImportError as error:
        raise ValueError(f"{name} needs gcsfs: {storage.INSTALL} ({error})") from error
    except Exception as error:  # The libraries that reach it share no base class of errors.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        return NotFetched(f"cannot be fetched: {terminal.one_line(error)}")
    return None
