"""Windows of many clips and lengths through padded batches of few shapes, and back in order."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_BATCHES_IN_FLIGHT = 2


class Bucket(NamedTuple):
    """A shape of batches: `num_rows` rows of up to `num_samples`, of one type of samples."""

    num_samples: int
    num_rows: int
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A window of a clip.

    Attributes:
      bucket: the smallest that holds it.
      samples: [samples].
      num_frames: frames in them that count.
      own: the first time step to take from it, and the one past the last.
    """

    bucket: Bucket
    samples: np.ndarray
    num_frames: int
    own: tuple[int, int]


class Batch(NamedTuple):
    """What is computed at once; rows that stand for none are a frame of silence and own nothing.

    audio: [num_rows, num_samples], padded with zeros. num_frames: int32 [num_rows].
    own: int32 [num_rows, 2].
    """

    audio: np.ndarray
    num_frames: np.ndarray
    own: np.ndarray


def pack(rows: list[Row], bucket: Bucket) -> Batch:
    """Pads rows to a bucket's shape."""
    audio = np.zeros((bucket.num_rows, bucket.num_samples), bucket.dtype)
    num_frames = np.ones(bucket.num_rows, np.int32)
    own = np.zeros((bucket.num_rows, 2), np.int32)
    for index, row in enumerate(rows):
        audio[index, : len(row.samples)] = row.samples
        num_frames[index] = row.num_frames
        own[index] = row.own
    return Batch(audio, num_frames, own)


@dataclasses.dataclass(eq=False)
class _Clip:
    """A clip under way; `parts` holds what each row gave, None where it has not yet."""

    number: int
    num_steps: int
    num_bytes: int
    parts: list[np.ndarray | None]
    num_missing: int


class Stream:
    """Clips in, what their rows gave out in the same order; rows wait until they fill a batch.

    compute: starts the computation of a batch and returns an array of a result a row, which is
      waited for two batches later.
    most_steps, most_bytes: a partial batch is computed once clips of more time steps or bytes wait.
    """

    def __init__(self, compute: Callable[[Batch], np.ndarray], most_steps: int, most_bytes: int):
        self._compute = compute
        self._most_steps = most_steps
        self._most_bytes = most_bytes
        self._numbers = itertools.count()
        self._clips: collections.deque[_Clip] = collections.deque()  # not yet given out
        self._queues: dict[Bucket, collections.deque[tuple[_Clip, int, Row]]] = {}
        self._in_flight: collections.deque[tuple[list[tuple[_Clip, int, Row]], np.ndarray]] = (
            collections.deque()
        )
        self._num_steps = self._num_bytes = 0

    def add(self, rows: list[Row], num_steps: int, num_bytes: int) -> Iterator[list[np.ndarray]]:
        """Takes in a clip and yields those that are complete, a list of what their rows gave each.

        num_steps, num_bytes: of the clip and its result, until it is given out.
        """
        clip = _Clip(next(self._numbers), num_steps, num_bytes, [None] * len(rows), len(rows))
        self._clips.append(clip)
        self._num_steps += num_steps
        self._num_bytes += num_bytes
        for place, row in enumerate(rows):
            queue = self._queues.setdefault(row.bucket, collections.deque())
            queue.append((clip, place, row))
            if len(queue) == row.bucket.num_rows:
                self._start(row.bucket)
        yield from self._complete()
        while self._num_steps > self._most_steps or self._num_bytes > self._most_bytes:
            self._advance()
            yield from self._complete()

    def flush(self) -> Iterator[list[np.ndarray]]:
        """Computes all that is left."""
        while self._clips:
            if self._queues:
                self._start(max(self._queues))
            else:
                self._collect()
            yield from self._complete()

    def _advance(self) -> None:
        """Moves the first clip on: starts the first of its rows, or waits for results."""
        oldest = min(self._queues, key=lambda b: self._queues[b][0][0].number, default=None)
        if oldest is not None and self._queues[oldest][0][0] is self._clips[0]:
            self._start(oldest)
        else:
            self._collect()

    def _start(self, bucket: Bucket) -> None:
        entries = self._take(bucket, bucket.num_rows)
        # A batch costs the same however full, and one batch fewer may be one compile fewer.
        for shorter in sorted(self._queues, reverse=True):
            if shorter.num_samples < bucket.num_samples and shorter.dtype == bucket.dtype:
                entries += self._take(shorter, bucket.num_rows - len(entries))
        batch = pack([row for _, _, row in entries], bucket)
        self._in_flight.append((entries, self._compute(batch)))
        if len(self._in_flight) > _BATCHES_IN_FLIGHT:
            self._collect()

    def _take(self, bucket: Bucket, limit: int) -> list[tuple[_Clip, int, Row]]:
        queue = self._queues[bucket]
        entries = [queue.popleft() for _ in range(min(limit, len(queue)))]
        if not queue:
            del self._queues[bucket]
        return entries

    def _collect(self) -> None:
        entries, results = self._in_flight.popleft()
        results = np.asarray(results)
        for (clip, place, _), result in zip(entries, results[: len(entries)], strict=True):
            # A copy, or the whole batch would stay for as long as one of its rows.
            clip.parts[place] = result.copy()
            clip.num_missing -= 1

    def _complete(self) -> Iterator[list[np.ndarray]]:
        while self._clips and not self._clips[0].num_missing:
            clip = self._clips.popleft()
            self._num_steps -= clip.num_steps
            self._num_bytes -= clip.num_bytes
            yield clip.parts
