"""Clips cut into windows, windows in padded batches of few shapes, and results back in order."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_BATCHES_IN_FLIGHT = 2


# --- Windows ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a clip that the model sees alone. All fields count time steps of the clip.

    A time step is one token along time, with all its bands.

    Attributes:
      start, stop: the steps that the window holds.
      own_start, own_stop: the steps that the embedding takes from it; the others are context.
    """

    start: int
    stop: int
    own_start: int
    own_stop: int


def cut(num_steps: int, window_steps: int, stride_steps: int) -> list[Window]:
    """Returns windows of `window_steps` over a clip; one window where that is 0 or more than it.

    Windows start every `stride_steps`, which are 1 to `window_steps`. The last window is moved back
    to end where the clip ends. Each step is taken from exactly one of the windows that hold it: the
    one with the nearest centre, and the earlier one of two at the same distance. So each step has
    as much context on both sides as there is.
    """
    if not window_steps or num_steps <= window_steps:
        return [Window(0, num_steps, 0, num_steps)]
    last = num_steps - window_steps
    starts = [*range(0, last, stride_steps), last]
    # The first step past the midpoint of two centres, which are start + (window - 1) / 2.
    edges = [
        (start + following + window_steps - 1) // 2 + 1
        for start, following in itertools.pairwise(starts)
    ]
    return [
        Window(start, start + window_steps, own_start, own_stop)
        for start, own_start, own_stop in zip(starts, [0, *edges], [*edges, num_steps], strict=True)
    ]


# --- Batches ----------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """A shape of batches: `num_rows` rows of `num_samples` samples."""

    num_samples: int
    num_rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A window with its samples.

    Attributes:
      bucket: the smallest bucket that holds the window.
      samples: int16 or float32 [samples], at most `bucket.num_samples`.
      num_frames: the frames in `samples`.
      own: the first time step to take from the window, and the step past the last.
    """

    bucket: Bucket
    samples: np.ndarray
    num_frames: int
    own: tuple[int, int]


class Batch(NamedTuple):
    """The rows that are computed at once. An empty row is one frame of silence and owns no step.

    Attributes:
      audio: float32 [num_rows, num_samples] in [-1, 1], padded with zeros.
      num_frames: int32 [num_rows].
      own: int32 [num_rows, 2].
    """

    audio: np.ndarray
    num_frames: np.ndarray
    own: np.ndarray


def pack(rows: list[Row], bucket: Bucket) -> Batch:
    """Returns a batch of the bucket's shape with these rows."""
    audio = np.zeros((bucket.num_rows, bucket.num_samples), np.float32)
    num_frames = np.ones(bucket.num_rows, np.int32)
    own = np.zeros((bucket.num_rows, 2), np.int32)
    for index, row in enumerate(rows):
        scale = 32_768 if row.samples.dtype == np.int16 else 1
        audio[index, : len(row.samples)] = row.samples / np.float32(scale)
        num_frames[index] = row.num_frames
        own[index] = row.own
    return Batch(audio, num_frames, own)


@dataclasses.dataclass(eq=False)
class _Clip:
    """A clip under way. `parts` holds the result of each row, None until it is computed."""

    num_steps: int
    num_bytes: int
    parts: list[np.ndarray | None]
    num_missing: int


class Stream:
    """Takes in clips as rows, and gives out the results of their rows in the order of the clips.

    Rows wait until they fill a batch of their bucket.

    Args:
      compute: starts the computation of a batch and returns an array with one result per row. The
        stream waits for the array two batches later.
      most_steps, most_bytes: once the waiting clips have more time steps or bytes than this, a
        batch is computed although it is not full.
    """

    def __init__(self, compute: Callable[[Batch], np.ndarray], most_steps: int, most_bytes: int):
        self._compute = compute
        self._most_steps = most_steps
        self._most_bytes = most_bytes
        self._clips: collections.deque[_Clip] = collections.deque()  # not yet given out
        self._queues: dict[Bucket, collections.deque[tuple[_Clip, int, Row]]] = {}
        self._in_flight: collections.deque[tuple[list[tuple[_Clip, int, Row]], np.ndarray]] = (
            collections.deque()
        )
        self._num_steps = self._num_bytes = 0

    def add(self, rows: list[Row], num_steps: int, num_bytes: int) -> Iterator[list[np.ndarray]]:
        """Takes in a clip and yields the results of each clip that is complete, one per row.

        Args:
          rows: the clip's windows.
          num_steps, num_bytes: what the clip and its result take until they are given out.
        """
        clip = _Clip(num_steps, num_bytes, [None] * len(rows), len(rows))
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
        """Computes the waiting rows and yields the results of the remaining clips."""
        while self._clips:
            if self._queues:
                self._start(max(self._queues))
            else:
                self._collect()
            yield from self._complete()

    def _advance(self) -> None:
        """Brings the first clip nearer its end: starts a row of it, or waits for results."""
        for bucket, queue in self._queues.items():
            if queue[0][0] is self._clips[0]:
                self._start(bucket)
                return
        self._collect()

    def _start(self, bucket: Bucket) -> None:
        entries = self._take(bucket, bucket.num_rows)
        # A batch costs the same however full it is, and one batch fewer may save a compilation.
        for shorter in sorted(self._queues, reverse=True):
            if shorter.num_samples < bucket.num_samples:
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
            # Without the copy the whole batch would stay in memory as long as one of its rows.
            clip.parts[place] = result.copy()
            clip.num_missing -= 1

    def _complete(self) -> Iterator[list[np.ndarray]]:
        while self._clips and not self._clips[0].num_missing:
            clip = self._clips.popleft()
            self._num_steps -= clip.num_steps
            self._num_bytes -= clip.num_bytes
            yield clip.parts
