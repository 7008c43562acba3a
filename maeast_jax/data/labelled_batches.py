"""Batches of labelled clips: which ones make up a step, and how they are cut and padded.

As in pretraining the stream is addressed by step: the clips of a step are computed from (seed,
epoch), so that a resumed run goes on with the same batches and needs no saved iterator.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import mixture, pipeline
from maeast_jax.data.labelled import Clip, Labelled

Batch = dict[str, np.ndarray]
_BATCHES_AHEAD = 4  # and one a thread at least


def train_index(
    labelled: Labelled, step: int, batch_size: int, seed: int, chances: np.ndarray | None = None
) -> np.ndarray:
    """Indices of the clips of a step: every epoch each clip once, in an order of its own.

    With `chances` an epoch is as many draws with replacement.
    """
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size), len(labelled))
    index = np.empty_like(place)
    for number in np.unique(epoch):
        order = _order(seed, int(number), len(labelled), None if chances is None else _Key(chances))
        index[epoch == number] = order[place[epoch == number]]
    return index


class _Key:
    """Chances as an argument that can be cached, by identity."""

    def __init__(self, chances: np.ndarray):
        self.chances = chances

    def __hash__(self) -> int:
        return id(self.chances)

    def __eq__(self, other) -> bool:
        return self.chances is other.chances


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int, key: _Key | None) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 3, epoch))))
    if key is None:
        return mixture.permutation(random, size)
    return random.choice(size, size, p=key.chances)


def train_batches(
    labelled: Labelled,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    total_steps: int,
    num_frames: int,
    max_frames: int,
    chances: np.ndarray | None = None,
    threads: int = 0,
) -> Iterator[Batch]:
    """Batches of steps `start_step` .. `total_steps` - 1.

    {audio int16 [b, S], num_samples int32 [b], target float32 [b, classes]}. With `num_frames` each
    clip is cut, at a place drawn from (seed, step, row), or padded with silence to as many; with 0
    a batch is as long as its longest clip, to the next of a few lengths, `max_frames` at most.
    """

    def load(step: int) -> Batch:
        clips = labelled.read(train_index(labelled, step, batch_size, seed, chances))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 4, step))))
        limit = fbank.num_samples(num_frames or max_frames)
        cut = []
        for clip in clips:
            start = int(random.integers(max(len(clip.samples) - limit, 0) + 1))
            cut.append(clip.samples[start : start + limit])
        return pad(cut, num_frames, max_frames) | {"target": labelled.targets(clips)}

    yield from _ahead(load, range(start_step, total_steps), threads)


def eval_batches(
    labelled: Labelled, *, batch_size: int, num_frames: int, max_frames: int, threads: int = 0
) -> Iterator[tuple[Batch, list[Clip]]]:
    """Every clip once, in the sets' order: batches as in training, and what they hold.

    The middle of a clip that is too long is taken. Batches are full: rows past the end are silence,
    and have no clip beside them.
    """
    limit = fbank.num_samples(num_frames or max_frames)

    def load(step: int) -> tuple[Batch, list[Clip]]:
        first = step * batch_size
        clips = labelled.read(np.arange(first, min(first + batch_size, len(labelled))))
        cut = []
        for clip in clips:
            start = max(len(clip.samples) - limit, 0) // 2
            cut.append(clip.samples[start : start + limit])
        cut += [np.zeros(1, np.int16)] * (batch_size - len(clips))
        return pad(cut, num_frames, max_frames), clips

    yield from _ahead(load, range(math.ceil(len(labelled) / batch_size)), threads)


def pad(clips: Sequence[np.ndarray], num_frames: int, max_frames: int) -> Batch:
    """{audio int16 [b, S], num_samples int32 [b]}: clips padded to one of few lengths.

    With `num_frames` to that many, with 0 to the first of at most nine lengths that holds them all.
    `num_samples` is a clip's own length, 400 (a frame) at least: padding is masked, where SSAST
    takes it for part of the clip.
    """
    longest = max(len(clip) for clip in clips)
    frames = num_frames
    if not frames:
        whole = math.ceil(max(longest - fbank.FRAME_LENGTH, 0) / fbank.FRAME_SHIFT) + 1
        frames = pipeline.bucket_steps(min(whole, max_frames), max_frames)
    audio = np.zeros((len(clips), fbank.num_samples(frames)), np.int16)
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = clip
    lengths = [max(len(clip), fbank.FRAME_LENGTH) for clip in clips]
    return {"audio": audio, "num_samples": np.array(lengths, np.int32)}


def _ahead(load: Callable[[int], object], steps: range, threads: int) -> Iterator:
    """`load` of each step, in order, a few of them ahead in threads."""
    threads = pipeline.num_threads(threads)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending = []
        rest = iter(steps)
        try:
            while True:
                for step in rest:
                    pending.append(pool.submit(load, step))
                    if len(pending) >= max(_BATCHES_AHEAD, threads):
                        break
                if not pending:
                    return
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
