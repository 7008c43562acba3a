"""Batches of clips: a step-addressed stream for training, a finite pass for evaluation.

Which clip stands at a position of the stream is computed (`mixture.py`) and its crop is drawn from
(seed, epoch, example). So any step starts in no time, resuming needs no saved iterator, and the
global batches are the same for any number of processes.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import audio, dataset
from maeast_jax.data.decode_pool import num_cores
from maeast_jax.data.mixture import Clips, address, open_clips, open_demo

Batch = dict[str, np.ndarray]
SOURCES = ("tfds", "synthetic")
FBANK_PLACES = ("device", "host")
SYNTHETIC_EVAL_CLIPS = 256
# More would hold more batches (84 MB for 256 clips of 10 s) than any device asks for.
_MOST_THREADS = 16
_SYNTHETIC_STARTS = 2**16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The configuration's `data` section; see config.py for what each field means."""

    source: str = "tfds"
    dir: str = ""
    train: str = ""
    eval: str = ""
    fbank: str = "device"
    sample_rate_hz: int = 0
    threads: int = 0

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
        """Whether this trains on the embedded corpus."""
        return self.source == "tfds" and not self.train

    @property
    def folder(self) -> str | None:
        """Where data sets lie, None for TFDS' default."""
        return os.path.expanduser(self.dir) or None

    @property
    def has_eval(self) -> bool:
        return bool(self.eval) or self.is_demo or self.source == "synthetic"


def open_train(data: DataConfig) -> Clips | None:
    """What `data.train` names, or the embedded corpus; None for synthetic noise."""
    if data.source == "synthetic":
        return None
    prepare_tensorflow()
    if data.is_demo:
        return open_demo("train", data.folder)
    return open_clips(data.train, "train", data.folder, data.sample_rate_hz or None)


def open_eval(data: DataConfig) -> Clips | None:
    """What `data.eval` names, or the embedded corpus' held-out clips where it is trained on.

    None for synthetic noise. Only for what `has_eval`.
    """
    if data.source == "synthetic":
        return None
    prepare_tensorflow()
    if data.is_demo and not data.eval:
        return open_demo("valid", data.folder)
    clips = open_clips(data.eval, "valid", data.folder, data.sample_rate_hz or None)
    if clips.weights is not None:
        raise ValueError(
            f"data.eval={data.eval!r} has weights, but every clip counts once; leave them out"
        )
    return clips


def eval_count(clips: Clips | None, max_clips: int) -> int:
    """How many clips an evaluation is over; `max_clips` 0 takes all."""
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
    """Batches of steps `start_step` .. `total_steps` - 1, of each the rows named (None: all).

    {audio int16 [b, S]} or {fbank float32 [b, T, F]}; a crop of `num_frames` at a random place,
    shorter clips looped to fill.
    """
    rows = np.arange(batch_size) if rows is None else rows
    num_samples = fbank.num_samples(num_frames)
    if clips is None:
        noise = _synthetic(seed, num_samples)
        for step in range(start_step, total_steps):
            yield {"audio": noise(step * batch_size + rows)}
        return

    def load(step: np.ndarray) -> np.ndarray:
        which, epoch, example = address(step * batch_size + rows, clips, seed)
        return read(clips, which, epoch, example, seed, num_samples)

    yield from _stream(data, load, start_step, total_steps, (len(rows), num_samples))


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
    """One pass over `max_clips` (0: all) spread evenly over the sets, each once; `rows` of each.

    Crops are the same at every pass. All batches are full: rows past the end are silence with
    `mask` False.
    """
    rows = np.arange(batch_size) if rows is None else rows
    num_samples = fbank.num_samples(num_frames)
    count = eval_count(clips, max_clips)
    # Its own seed: held-out noise.
    noise = _synthetic(seed + 1, num_samples) if clips is None else None

    def load(step: np.ndarray) -> np.ndarray:
        index = step * batch_size + rows
        real = index < count
        audio_BxS = np.zeros((len(rows), num_samples), np.int16)
        if clips is None:
            audio_BxS[real] = noise(index[real])
            return audio_BxS
        place = index[real] * len(clips) // count
        ends = np.cumsum([len(split) for split in clips.splits])
        which = np.searchsorted(ends, place, side="right")
        example = place - np.concatenate([[0], ends])[which]
        audio_BxS[real] = read(clips, which, np.zeros_like(example), example, seed, num_samples)
        return audio_BxS

    num_batches = math.ceil(count / batch_size)
    if clips is None:
        batches = ({"audio": load(step)} for step in range(num_batches))
    else:
        batches = _stream(data, load, 0, num_batches, (len(rows), num_samples))
    for step, batch in enumerate(batches):
        yield batch | {"mask": step * batch_size + rows < count}


def read(
    clips: Clips,
    which: np.ndarray,
    epoch: np.ndarray,
    example: np.ndarray,
    seed: int,
    num_samples: int,
) -> np.ndarray:
    """int16 [b, num_samples]: the clips addressed, each cropped or looped by its own draw."""
    audio_BxS = np.empty((len(which), num_samples), np.int16)
    for component in np.unique(which):
        split = clips.splits[component]
        places = np.flatnonzero(which == component)
        for place, record in zip(places, split.read(example[places]), strict=True):
            samples = samples_of(split, record["audio"], example[place])
            key = (seed, component, epoch[place], example[place])
            audio_BxS[place] = _crop(samples, num_samples, key)
    return audio_BxS


def prepare_tensorflow() -> None:
    """Keeps TensorFlow, which reads data sets, off the devices.

    Raises ValueError where it is not installed, with what to install.
    """
    try:
        import tensorflow
        import tensorflow_datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading data sets needs {error.name}: pip install tensorflow-cpu tensorflow-datasets"
        ) from error
    # The accelerator is jax's alone.
    tensorflow.config.set_visible_devices([], "GPU")


def num_threads(asked: int) -> int:
    """How many batches are loaded side by side; 0 asks for one a core, within reason."""
    return asked or min(num_cores(), _MOST_THREADS)


def samples_of(split: dataset.Split, stored: np.ndarray, example: int) -> np.ndarray:
    """int16 [samples] at 16 kHz; raises DataError, with its name, for a clip that is none."""
    try:
        samples = audio.to_int16(stored, split.sample_rate_hz)
        if not len(samples):
            raise ValueError("it holds no samples")
    except ValueError as error:
        raise dataset.DataError(
            f"{split.name}@{split.split} example {example}: {error}; prepare the set without it"
        ) from error
    return samples


def _crop(samples: np.ndarray, num_samples: int, key: Sequence[int]) -> np.ndarray:
    """A window at a random place; a clip that is shorter goes round from a random place."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([int(k) for k in key])))
    if len(samples) >= num_samples:
        start = random.integers(len(samples) - num_samples + 1)
        return samples[start : start + num_samples]
    start = random.integers(len(samples))
    return np.resize(np.roll(samples, -start), num_samples)


def _stream(data: DataConfig, load, start: int, stop: int, shape) -> Iterator[Batch]:
    """tf.data over steps: `load` in a thread pool, in order, ahead of the training loop."""
    import tensorflow as tf

    failures: list[Exception] = []

    def load_or_tell(step: np.ndarray) -> np.ndarray:
        try:
            return load(step)
        except Exception as error:
            failures.append(error)
            raise

    threads = num_threads(data.threads)
    batches = tf.data.Dataset.range(start, stop).map(
        lambda step: tf.ensure_shape(tf.numpy_function(load_or_tell, [step], tf.int16), shape),
        num_parallel_calls=threads,
        deterministic=True,
    )
    name = "audio"
    if data.fbank == "host":
        name = "fbank"
        batches = batches.map(fbank.fbank_tf, num_parallel_calls=threads, deterministic=True)
    try:
        for batch in batches.prefetch(2).as_numpy_iterator():
            yield {name: batch}
    except tf.errors.OpError:
        # TensorFlow wraps what `load` raised in a page of its own graph.
        if failures:
            raise failures[0] from None
        raise


def _synthetic(seed: int, num_samples: int) -> Callable[[np.ndarray], np.ndarray]:
    """Positions [b] to int16 noise [b, num_samples], a function of (seed, position).

    Drawn once, and cut at another place for each position: drawing costs more than a step does on
    an accelerator.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    samples = random.integers(-8192, 8192, num_samples + _SYNTHETIC_STARTS, np.int16)

    def clips(positions: np.ndarray) -> np.ndarray:
        # An odd factor: each place once in that many positions.
        starts = positions * 40_503 % _SYNTHETIC_STARTS
        audio_BxS = np.empty((len(positions), num_samples), np.int16)
        for row, start in zip(audio_BxS, starts, strict=True):
            row[:] = samples[start : start + num_samples]
        return audio_BxS

    return clips


def bucket_steps(num_steps: int, window_steps: int) -> int:
    """The length that `num_steps` are padded to: the smallest bucket that holds them.

    Buckets are 2, 3, 4, 6, 8, 12, 16, 24 and 32 parts in 32 of the window, rounded up: nine at
    most, whatever the lengths. Above the window, where nothing is cut, the series goes on.
    """
    buckets = (
        -(-window_steps * (parts << doubling) // 32)
        for doubling in itertools.count()
        for parts in (2, 3)
    )
    return next(bucket for bucket in buckets if bucket >= num_steps)
