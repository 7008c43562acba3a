"""Batches of clips: a step-addressed stream for training, a finite pass for evaluation.

`mixture.address` computes which clip stands at a position of the stream, and (seed, epoch, example)
determine its crop. So any step starts at once, resuming needs no saved iterator, and the global
batches are the same for any number of processes.
"""

import atexit
import dataclasses
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import audio, dataset
from maeast_jax.data.mixture import Clips, address, generator, open_clips, open_demo

Batch = dict[str, np.ndarray]
SOURCES = ("tfds", "synthetic")
FBANK_PLACES = ("device", "host")
SYNTHETIC_EVAL_CLIPS = 256
# More threads would hold more batches (84 MB per batch of 256 clips of 10 s) than a device needs.
_MOST_THREADS = 16
_SYNTHETIC_STARTS = 2**16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The configuration's `data` section; config.py explains each field."""

    source: str
    dir: str
    train: str
    eval: str
    fbank: str
    sample_rate_hz: int
    threads: int

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r} is unknown; known: {', '.join(SOURCES)}")
        if self.fbank not in FBANK_PLACES:
            raise ValueError(
                f"data.fbank={self.fbank!r} is unknown; known: {', '.join(FBANK_PLACES)}"
            )
        if self.source == "synthetic" and (self.train or self.eval):
            raise ValueError(
                f"data.train={self.train!r} and data.eval={self.eval!r} have no meaning with "
                "data.source=synthetic; leave them empty or set data.source=tfds"
            )
        if self.source == "synthetic" and self.fbank == "host":
            raise ValueError("data.fbank=host needs data.source=tfds; use data.fbank=device")
        for field in ("sample_rate_hz", "threads"):
            if getattr(self, field) < 0:
                raise ValueError(f"data.{field}={getattr(self, field)} must not be negative")

    @property
    def is_demo(self) -> bool:
        """Whether `train` names no data set, so that training uses the embedded corpus."""
        return self.source == "tfds" and not self.train

    @property
    def folder(self) -> str | None:
        """The folder of data sets, None for TFDS' default."""
        return os.path.expanduser(self.dir) or None

    @property
    def has_eval(self) -> bool:
        return bool(self.eval) or self.is_demo or self.source == "synthetic"


def open_train(data: DataConfig) -> Clips | None:
    """Opens the sets of `data.train`, or the embedded corpus; returns None for synthetic noise."""
    if data.source == "synthetic":
        return None
    if data.is_demo:
        return open_demo("train", data.folder)
    return open_clips(data.train, "train", data.folder, data.sample_rate_hz or None)


def open_eval(data: DataConfig) -> Clips | None:
    """Opens the sets of `data.eval`, or the held-out clips of the embedded corpus.

    Returns None for synthetic noise. Call this only where `data.has_eval`.

    Raises:
      DataError, ValueError: as `open_clips`, and where the sets have weights.
    """
    if data.source == "synthetic":
        return None
    if data.is_demo and not data.eval:
        return open_demo("valid", data.folder)
    clips = open_clips(data.eval, "valid", data.folder, data.sample_rate_hz or None)
    if clips.weights is not None:
        raise ValueError(
            f"data.eval={data.eval!r} has weights, but every clip counts once; leave them out"
        )
    return clips


def eval_count(clips: Clips | None, max_clips: int) -> int:
    """Number of clips in an evaluation; `max_clips` 0 takes all."""
    count = SYNTHETIC_EVAL_CLIPS if clips is None else len(clips)
    return min(count, max_clips) if max_clips else count


def train_batches(
    data: DataConfig,
    clips: Clips | None,
    *,
    seed: int,
    batch_size: int,
    num_frames: int,
    start_step: int,
    total_steps: int,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields the batches of steps `start_step` to `total_steps` - 1.

    A clip is cropped to `num_frames` at a random place; a shorter clip is looped to fill them.

    Args:
      clips: what `open_train` returned.
      batch_size: clips in the global batch.
      rows: the rows of each global batch to yield; None yields all.

    Yields:
      {audio int16 [rows, samples]}, or {fbank float32 [rows, frames, bands]} with data.fbank=host.
    """
    rows = np.arange(batch_size) if rows is None else rows
    num_samples = fbank.num_samples(num_frames)
    noise = _synthetic(seed, num_samples) if clips is None else None

    def load(step: int) -> Batch:
        positions = step * batch_size + rows
        if clips is None:
            return {"audio": noise(positions)}
        return {"audio": read(clips, *address(positions, clips, seed), seed, num_samples)}

    fields = {"audio": (np.int16, (len(rows), num_samples))}
    return _stream(data, load, range(start_step, total_steps), fields)


def eval_batches(
    data: DataConfig,
    clips: Clips | None,
    *,
    seed: int,
    batch_size: int,
    num_frames: int,
    max_clips: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields one pass over `max_clips` clips (0: all) spread evenly over the sets, each clip once.

    Crops are the same at every pass. All batches are full: rows past the last clip are silence.

    Args:
      clips: what `open_eval` returned.
      batch_size, num_frames, rows: as for `train_batches`.

    Yields:
      As `train_batches`, with `mask` bool [rows], False where a row is past the last clip.
    """
    rows = np.arange(batch_size) if rows is None else rows
    num_samples = fbank.num_samples(num_frames)
    count = eval_count(clips, max_clips)
    # Another seed than in training: the noise is held out.
    noise = _synthetic(seed + 1, num_samples) if clips is None else None

    def load(step: int) -> Batch:
        index = step * batch_size + rows
        mask = index < count
        audio_BxS = np.zeros((len(rows), num_samples), np.int16)
        if clips is None:
            audio_BxS[mask] = noise(index[mask])
        else:
            which, example = clips.find(index[mask] * len(clips) // count)
            epoch = np.zeros_like(example)
            audio_BxS[mask] = read(clips, which, epoch, example, seed, num_samples)
        return {"audio": audio_BxS, "mask": mask}

    fields = {"audio": (np.int16, (len(rows), num_samples)), "mask": (np.bool_, (len(rows),))}
    return _stream(data, load, range(math.ceil(count / batch_size)), fields)


def read(
    clips: Clips,
    which: np.ndarray,
    epoch: np.ndarray,
    example: np.ndarray,
    seed: int,
    num_samples: int,
) -> np.ndarray:
    """Returns int16 [b, num_samples]: clips by data set and example, each with its own crop."""
    audio_BxS = np.empty((len(which), num_samples), np.int16)
    records = clips.read(which, example)
    for row, record, *place in zip(audio_BxS, records, which, epoch, example, strict=True):
        component, _, number = place
        samples = samples_of(clips.splits[component], record["audio"], number)
        row[:] = _crop(samples, num_samples, (seed, *place))
    return audio_BxS


def samples_of(split: dataset.Split, stored: np.ndarray, example: int) -> np.ndarray:
    """Returns int16 [samples] at 16 kHz; raises DataError, naming the clip, if it is not audio."""
    try:
        return audio.to_int16(stored, split.sample_rate_hz)
    except ValueError as error:
        raise dataset.DataError(
            f"{split.name}@{split.split} example {example}: {error}; prepare the set without it"
        ) from error


def _crop(samples: np.ndarray, num_samples: int, key: Sequence[int]) -> np.ndarray:
    """A window at a random place; a shorter clip goes round from a random place."""
    random = generator(*key)
    if len(samples) >= num_samples:
        start = random.integers(len(samples) - num_samples + 1)
        return samples[start : start + num_samples]
    start = random.integers(len(samples))
    return np.resize(np.roll(samples, -start), num_samples)


def _stream(
    data: DataConfig, load: Callable[[int], Batch], steps: range, fields: dict
) -> Iterator[Batch]:
    if data.source == "synthetic":
        return (load(step) for step in steps)  # needs neither threads nor TensorFlow
    transform = _host_fbank if data.fbank == "host" else None
    return prefetched(load, steps, fields, data.threads, transform)


def _host_fbank(batch: dict[str, Any]) -> dict[str, Any]:
    return {"fbank": fbank.fbank_tf(batch.pop("audio")), **batch}


# --- prefetching ------------------------------------------------------------------------------


def prefetched(
    load: Callable[[int], Batch],
    steps: range,
    fields: dict[str, tuple[type, tuple[int | None, ...]]],
    threads: int,
    transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Iterator[Batch]:
    """Yields `load(step)` for each step in order; tf.data loads batches ahead in threads.

    Closing the iterator, or the end of the program, waits only for the batches being loaded.

    Args:
      load: returns the batch of a step; several threads call it at once.
      fields: type and shape of each array of a batch; None is a size that varies.
      threads: number of threads, each of which loads a whole batch; 0 for one per core, at most 16.
      transform: a function of TensorFlow on the tensors of a batch.

    Raises:
      Whatever `load` raises, at the step where it is raised.
    """
    threads = threads or min(audio.num_cores(), _MOST_THREADS)
    stream = _prefetched(load, steps, fields, threads, transform)
    _OPEN.add(stream)
    return stream


def _prefetched(load, steps, fields, threads, transform) -> Iterator[Batch]:
    import tensorflow as tf

    errors: dict[int, Exception] = {}

    def load_or_tell(step: np.ndarray) -> list[np.ndarray]:
        try:
            batch = load(int(step))
        except Exception as error:
            errors[int(step)] = error
            raise
        return [batch[name] for name in fields]

    def batch_of(step: tf.Tensor) -> dict[str, tf.Tensor]:
        types = [dtype for dtype, _ in fields.values()]
        arrays = tf.numpy_function(load_or_tell, [step], types)
        return {
            name: tf.ensure_shape(array, shape)
            for array, (name, (_, shape)) in zip(arrays, fields.items(), strict=True)
        }

    batches = tf.data.Dataset.range(steps.start, steps.stop)
    for function in (batch_of, transform):
        if function is not None:
            batches = batches.map(function, num_parallel_calls=threads, deterministic=True)
    options = tf.data.Options()
    if threads > audio.num_cores():
        # TensorFlow's own pool has a thread per core, whatever num_parallel_calls is. With as many
        # threads a pool of its own slows the demo's training down by 5 %.
        options.threading.private_threadpool_size = threads
    try:
        yield from batches.prefetch(2).with_options(options).as_numpy_iterator()
        return
    except tf.errors.OpError as wrapped:
        # TensorFlow wraps the error of `load` in a page about its graph.
        error = errors[min(errors)] if errors else wrapped
    # Raised out here the error holds no reference to the iterator, whose threads end at once.
    raise error


# TensorFlow's threads call `load` and so wait for the interpreter. If a stream is still open when
# the interpreter ends, it waits for those threads, for ever.
_OPEN: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_OPEN):
        stream.close()


def _synthetic(seed: int, num_samples: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from positions [b] to int16 noise [b, num_samples].

    The noise is drawn once and cut at another place for each position, because drawing takes longer
    than a step on an accelerator.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    samples = random.integers(-8192, 8192, num_samples + _SYNTHETIC_STARTS, np.int16)

    def clips(positions: np.ndarray) -> np.ndarray:
        # The factor is odd, so each start comes once in _SYNTHETIC_STARTS positions.
        starts = positions * 40_503 % _SYNTHETIC_STARTS
        audio_BxS = np.empty((len(positions), num_samples), np.int16)
        for row, start in zip(audio_BxS, starts, strict=True):
            row[:] = samples[start : start + num_samples]
        return audio_BxS

    return clips


def bucket_steps(num_steps: int, window_steps: int) -> int:
    """The length to pad `num_steps` to: the smallest bucket that holds them.

    Buckets are 2, 3, 4, 6, 8, 12, 16, 24 and 32 parts in 32 of the window, rounded up, so there are
    at most nine of them. Beyond the window, where nothing is cut, the series goes on.
    """
    buckets = (
        -(-window_steps * (parts << doubling) // 32)
        for doubling in itertools.count()
        for parts in (2, 3)
    )
    return next(bucket for bucket in buckets if bucket >= num_steps)
