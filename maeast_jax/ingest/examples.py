"""Decodes recordings, wherever they lie, and cuts them into the clips of a data set."""

import concurrent.futures
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from maeast_jax.data import SAMPLE_RATE_HZ, DecodePool, Example, Recording
from maeast_jax.ingest.sources import AudioFile
from maeast_jax.runtime import storage, terminal

SHORTEST_TAIL_SECONDS = 1.0

# Recordings on gs:// that are fetched at once; each waits for an answer, not for a processor.
_FETCHED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Cut:
    """How files become clips.

    Attributes:
      piece_seconds: longer files are cut into pieces of this length; 0 cuts none.
      min_seconds: shorter clips are left out.
    """

    piece_seconds: float
    min_seconds: float


def decode(pool: DecodePool, paths: Sequence[str]) -> Iterator[Recording | str]:
    """Yields for each path, in order, its recording, or why there is none.

    Recordings on gs:// are copied to temporary files first, some at a time.
    """
    if not any(map(storage.is_remote, paths)):
        yield from pool.decode(paths)
        return
    with storage.quiet(), concurrent.futures.ThreadPoolExecutor(_FETCHED_AT_ONCE) as threads:
        for start in range(0, len(paths), _FETCHED_AT_ONCE):
            part = paths[start : start + _FETCHED_AT_ONCE]
            with tempfile.TemporaryDirectory() as folder:
                # Decoders also look at the suffix.
                files = [
                    os.path.join(folder, f"{number}{os.path.splitext(path)[1]}")
                    if storage.is_remote(path)
                    else path
                    for number, path in enumerate(part)
                ]
                failures = list(threads.map(_fetch, part, files))
                for failure, decoded in zip(failures, pool.decode(files), strict=True):
                    yield failure or decoded


def _fetch(path: str, file: str) -> str | None:
    """Copies a recording on gs:// to a file of this machine; returns why that failed."""
    if not storage.is_remote(path):
        return None
    try:
        storage.path(path).copy(file)
    except FileNotFoundError:
        return "not found"
    except Exception as error:  # the libraries that reach gs:// share no base class of errors
        return f"cannot be fetched: {terminal.one_line(error)}"
    return None


def clips_of(file: AudioFile, decoded: Recording | str, cut: Cut) -> list[Example]:
    """Returns the examples of a file; the ids of pieces end in their number.

    Args:
      decoded: the recording; or the reason why there is none, which gives no clip.
    """
    if isinstance(decoded, str):
        return []
    piece_seconds = cut.piece_seconds if file.piece_seconds is None else file.piece_seconds
    samples = decoded.samples
    pieces = cut_pieces(
        samples,
        piece_samples=round(piece_seconds * SAMPLE_RATE_HZ),
        min_samples=round(cut.min_seconds * SAMPLE_RATE_HZ),
    )
    if len(pieces) == 1 and len(pieces[0]) == len(samples):
        return [(file.id, samples, file.label)]
    return [(f"{file.id}#{index:04d}", piece, file.label) for index, piece in enumerate(pieces)]


def cut_pieces(samples: np.ndarray, piece_samples: int, min_samples: int) -> list[np.ndarray]:
    """Cuts [samples] into pieces of `piece_samples` (0: one piece); the last one may be shorter.

    A last piece under a second (or `min_samples`) is dropped, unless it is the only one. A single
    piece shorter than `min_samples` gives none.
    """
    if not piece_samples or len(samples) <= piece_samples:
        return [samples] if len(samples) >= min_samples else []
    shortest = max(min_samples, round(SHORTEST_TAIL_SECONDS * SAMPLE_RATE_HZ))
    starts = range(0, len(samples), piece_samples)
    pieces = [samples[start : start + piece_samples] for start in starts]
    return pieces if len(pieces[-1]) >= shortest else pieces[:-1]
