"""Cuts a decoded file into the clips that go into a data set."""

import dataclasses

import numpy as np

from maeast_jax.data import SAMPLE_RATE_HZ, Example
from maeast_jax.ingest.sources import AudioFile

SHORTEST_TAIL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Cut:
    """Longer files are cut into pieces of `piece_seconds` (0: never), shorter clips left out."""

    piece_seconds: float
    min_seconds: float


def clips_of(file: AudioFile, decoded: np.ndarray | str, cut: Cut) -> list[Example]:
    """The examples of a file; ids of pieces end in their number.

    Args:
      decoded: int16 [samples]; or why there are none, which gives no clip.
    """
    if isinstance(decoded, str):
        return []
    piece_seconds = cut.piece_seconds if file.piece_seconds is None else file.piece_seconds
    pieces = cut_pieces(
        decoded,
        piece_samples=round(piece_seconds * SAMPLE_RATE_HZ),
        min_samples=round(cut.min_seconds * SAMPLE_RATE_HZ),
    )
    if len(pieces) == 1 and len(pieces[0]) == len(decoded):
        return [(file.id, decoded, file.label)]
    return [(f"{file.id}#{index:04d}", piece, file.label) for index, piece in enumerate(pieces)]


def cut_pieces(samples: np.ndarray, piece_samples: int, min_samples: int) -> list[np.ndarray]:
    """Cuts [samples] into pieces of `piece_samples` (0: one piece), the last one shorter.

    A last piece under a second (or `min_samples`) is dropped, unless it is the only one, and one
    piece shorter than `min_samples` gives none.
    """
    if not piece_samples or len(samples) <= piece_samples:
        return [samples] if len(samples) >= min_samples else []
    shortest = max(min_samples, round(SHORTEST_TAIL_SECONDS * SAMPLE_RATE_HZ))
    starts = range(0, len(samples), piece_samples)
    pieces = [samples[start : start + piece_samples] for start in starts]
    return pieces if len(pieces[-1]) >= shortest else pieces[:-1]
