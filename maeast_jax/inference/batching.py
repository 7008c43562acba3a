"""Clips cut into windows, windows in padded batches of few shapes, and results back in order."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from maeast_jax import fbank
from maeast_jax.data import pipeline
from maeast_jax.model import ModelConfig

DEFAULT_WINDOW_FRAMES = 1024  # the paper's clip, 10.24 s
FRAMES_PER_SECOND = 100
# On two CPU cores the paper's model computes 1,520 tokens/s in batches of 1,024 tokens, 1,340 in
# single rows of 512, and 1,180 in batches of 4,096, which no longer fit the cache.
_CPU_BATCH_TOKENS = 1_024
_ACCELERATOR_BATCH_TOKENS = 16_384

# Rows wait for others of their length until a batch that is not full costs little in comparison.
_WAITING_BATCHES = 16
_WAITING_BYTES = 1 << 30
_BATCHES_IN_FLIGHT = 2


def checked(number: int, clip: np.ndarray) -> np.ndarray:
    """Returns a clip as `fbank.as_samples` does; raises ValueError, with its number, for others."""
    clip = np.asarray(clip)
    if clip.ndim != 1:
        raise ValueError(f"clip {number} has shape {list(clip.shape)}, expected [samples]")
    try:
        return fbank.as_samples(clip)
    except ValueError as error:
        raise ValueError(f"clip {number}: {error}") from error


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


def whole_tokens(name: str, seconds: float | None, patch_frames: int) -> int | None:
    """Returns the frames in so many seconds, rounded down to whole tokens; None for None.

    Raises ValueError, which starts with `name`, for less than a token. 0 stands for uncut clips.
    """
    if seconds is None:
        return None
    token_seconds = patch_frames / FRAMES_PER_SECOND
    if seconds and not token_seconds <= seconds < math.inf:
        raise ValueError(
            f"{name}={seconds:g} must be at least {token_seconds:g}, the length of a token"
        )
    return int(seconds / token_seconds + 1e-6) * patch_frames  # 10.24 * 100 < 1024


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


# --- From clips to results --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts clips into windows, and takes the windows in batches of few shapes through a model.

    Frames past a clip's last whole time step are left out, and a clip shorter than one step is
    padded to it. Windows are padded to one of nine lengths.

    Attributes:
      patch_frames: frames of a time step.
      bands: tokens of a time step.
      window_frames, stride_frames: frames of a window, and from one window to the next; both 0
        where clips are never cut.
      batch_tokens: tokens per batch.

    Raises ValueError, in one line, for windows that are not made of whole steps.
    """

    patch_frames: int
    bands: int
    window_frames: int
    stride_frames: int
    batch_tokens: int

    def __post_init__(self):
        _check_window(self.window_frames, self.stride_frames, self.patch_frames)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        window_frames: int,
        stride_frames: int | None = None,
        batch_tokens: int | None = None,
    ) -> "Cutter":
        """Returns the cutter for a model.

        Args:
          stride_frames: None takes the window, so that only the last window overlaps.
          batch_tokens: None takes 1,024 on a CPU, 16,384 elsewhere.
        """
        if stride_frames is None:
            stride_frames = window_frames
        if batch_tokens is None:
            is_cpu = jax.default_backend() == "cpu"
            batch_tokens = _CPU_BATCH_TOKENS if is_cpu else _ACCELERATOR_BATCH_TOKENS
        patch_frames, _ = config.patch_shape
        return cls(patch_frames, config.band_tokens, window_frames, stride_frames, batch_tokens)

    def num_steps(self, num_samples: int) -> int:
        """Returns the whole time steps in a clip, at least 1.

        Raises ValueError for fewer than 400 samples.
        """
        return max(1, fbank.num_frames(num_samples) // self.patch_frames)

    def cut(self, num_samples: int) -> list[Window]:
        """Returns the windows of a clip; raises ValueError for fewer than 400 samples."""
        window_steps = self.window_frames // self.patch_frames
        stride_steps = self.stride_frames // self.patch_frames
        return cut(self.num_steps(num_samples), window_steps, stride_steps)

    def results(
        self,
        clips: Iterable[Sequence[np.ndarray]],
        compute: Callable[[Batch], jax.Array],
        result_bytes: Callable[[list[Window]], int],
    ) -> Iterator[tuple[list[Window], list[np.ndarray]]]:
        """Yields the windows of each clip and a result per window, in order.

        Args:
          clips: each clip in one or several versions, int16 or float32 [samples], at least 400.
            They are taken up to 16 batches or 1 GiB ahead of the results.
          compute: starts the computation of a batch and returns one result per row.
          result_bytes: the size of the results of these windows.
        """
        most_steps = _WAITING_BATCHES * self.batch_tokens // self.bands
        stream = Stream(compute, most_steps, _WAITING_BYTES)
        windows_of_clips = collections.deque()
        for versions in clips:
            windows, rows, num_bytes = [], [], 0
            for samples in versions:
                of_version = self.cut(len(samples))
                windows += of_version
                rows += self._rows(samples, of_version)
                num_bytes += samples.nbytes + result_bytes(of_version)
            windows_of_clips.append(windows)
            for parts in stream.add(rows, num_own(windows), num_bytes):
                yield windows_of_clips.popleft(), parts
        for parts in stream.flush():
            yield windows_of_clips.popleft(), parts

    def _rows(self, samples: np.ndarray, windows: list[Window]) -> list[Row]:
        """Only a clip shorter than a step lacks frames."""
        num_frames = fbank.num_frames(len(samples))
        rows = []
        for window in windows:
            start = window.start * self.patch_frames
            row_frames = min(window.stop * self.patch_frames, num_frames) - start
            first = start * fbank.FRAME_SHIFT
            row_samples = samples[first : first + fbank.num_samples(row_frames)]
            own = (window.own_start - window.start, window.own_stop - window.start)
            rows.append(Row(self._bucket(window.stop - window.start), row_samples, row_frames, own))
        return rows

    def _bucket(self, num_steps: int) -> Bucket:
        window_frames = self.window_frames or DEFAULT_WINDOW_FRAMES
        steps = pipeline.bucket_steps(num_steps, window_frames // self.patch_frames)
        num_rows = max(1, self.batch_tokens // (steps * self.bands))
        return Bucket(fbank.num_samples(steps * self.patch_frames), num_rows)


def num_own(windows: Iterable[Window]) -> int:
    """Returns how many time steps the windows own."""
    return sum(window.own_stop - window.own_start for window in windows)


def _check_window(window_frames: int, stride_frames: int, patch_frames: int) -> None:
    is_uncut = window_frames == stride_frames == 0
    if not is_uncut and (
        not 0 < stride_frames <= window_frames
        or window_frames % patch_frames
        or stride_frames % patch_frames
    ):
        window_s, stride_s = (
            frames / FRAMES_PER_SECOND for frames in (window_frames, stride_frames)
        )
        raise ValueError(
            f"windows of {window_frames} frames ({window_s:g} s) every {stride_frames} frames "
            f"({stride_s:g} s): both must be multiples of {patch_frames} frames, the length of a "
            "token, and the stride at most the window; a window of 0 has no stride"
        )
