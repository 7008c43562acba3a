"""Labelled clips for fine-tuning: which ones make up a step, their samples, lengths and targets.

As in pretraining the stream is addressed by step: the clips of a step are computed from (seed,
epoch), so that a resumed run goes on with the same batches and needs no saved iterator.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maeast_jax import data, fbank, mixture, windows
from maeast_jax.mixture import Clips
from maeast_jax.shards import DataError

Batch = dict[str, np.ndarray]
_BATCHES_AHEAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """One or several labelled data sets as one, with one numbering of the classes.

    Attributes:
      text: what it was opened by.
      clips: the sets.
      class_names: in the order of the classes' numbers.
      is_multi_label: whether a clip has any number of classes.
      renumbering: for each set, its own numbers' classes.
      index: which of the sets' clips these are, ascending.
    """

    text: str
    clips: Clips
    class_names: tuple[str, ...]
    is_multi_label: bool
    renumbering: tuple[np.ndarray, ...]
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, places: np.ndarray) -> "Labelled":
        """Those of the clips."""
        return dataclasses.replace(self, index=np.sort(self.index[places]))

    def read(self, places: np.ndarray) -> list["Clip"]:
        """The clips at `places`, in that order."""
        index = self.index[places]
        ends = np.cumsum([len(split) for split in self.clips.splits])
        which = np.searchsorted(ends, index, side="right")
        example = index - np.concatenate([[0], ends])[which]
        found: list[Clip | None] = [None] * len(which)
        for component in np.unique(which):
            split = self.clips.splits[component]
            places = np.flatnonzero(which == component)
            # Ascending, so that a file is read forwards.
            places = places[np.argsort(example[places], kind="stable")]
            for place, record in zip(places, split.read(example[places]), strict=True):
                samples = data.samples_of(split, record["audio"], example[place])
                classes = self.renumbering[component][np.atleast_1d(record["label"])]
                name = record["id"] or f"{split.name}@{split.split}#{example[place]}"
                found[place] = Clip(name, samples, classes)
        return found

    def targets(self, clips: Sequence["Clip"]) -> np.ndarray:
        """float32 [n, classes]: 1 where a clip has a class."""
        target_NxC = np.zeros((len(clips), self.num_classes), np.float32)
        for row, clip in zip(target_NxC, clips, strict=True):
            row[clip.classes] = 1.0
        return target_NxC


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A clip: `id`, int16 `samples` at 16 kHz, and the numbers of its classes."""

    id: str
    samples: np.ndarray
    classes: np.ndarray


def open_labelled(
    text: str,
    default_split: str,
    data_dir: str | None,
    *,
    sample_rate_hz: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Labelled:
    """Opens what `text` names (a mixture without weights), all in one numbering of the classes.

    Args:
      class_names: of the set that was trained on; None takes the first data set's.

    Raises:
      DataError, ValueError: not there, without labels, with weights, or a class that is not among
        `class_names`; one line.
    """
    clips = mixture.open_clips(text, default_split, data_dir, sample_rate_hz)
    if clips.weights is not None:
        raise ValueError(f"{text!r} has weights, but every labelled clip counts once; drop them")
    for split in clips.splits:
        if split.label_names is None:
            raise DataError(
                f"data set {split.name} has no labels; build it with --label_from_folder, or from "
                "a manifest with a column `label`"
            )
    class_names = tuple(class_names or clips.splits[0].label_names)
    kinds = {split.is_multi_label for split in clips.splits}
    if len(kinds) > 1:
        raise DataError(f"{text!r} mixes sets of one label a clip and of several; name one kind")
    renumbering = tuple(_renumber(split, class_names) for split in clips.splits)
    index = np.arange(len(clips))
    return Labelled(text, clips, class_names, kinds.pop(), renumbering, index)


def _renumber(split, class_names: tuple[str, ...]) -> np.ndarray:
    known = {name: number for number, name in enumerate(class_names)}
    if unknown := [name for name in split.label_names if name not in known]:
        raise DataError(
            f"data set {split.name} has the class {unknown[0]!r}, which is not among the "
            f"{len(class_names)} that are trained on; name a set of the same classes"
        )
    return np.array([known[name] for name in split.label_names], np.int32)


def read_classes(labelled: Labelled) -> list[np.ndarray]:
    """The classes of every clip, in order; reads the sets once."""
    return [clip.classes for clip in each(labelled)]


def each(labelled: Labelled) -> Iterator[Clip]:
    """Every clip, in order, read by the hundred."""
    for places in np.array_split(np.arange(len(labelled)), math.ceil(len(labelled) / 128)):
        yield from labelled.read(places)


def truth(labelled: Labelled, classes: Sequence[np.ndarray]) -> np.ndarray:
    """What metrics compare with: int labels [n], or float32 [n, classes] of 0 and 1."""
    if not labelled.is_multi_label:
        return np.array([of_clip[0] for of_clip in classes], np.int64)
    target_NxC = np.zeros((len(classes), labelled.num_classes), np.float32)
    for row, of_clip in zip(target_NxC, classes, strict=True):
        row[of_clip] = 1.0
    return target_NxC


def rarity(classes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """float64 [n]: a clip's chance to be drawn, in proportion to its classes' sums of 1 / size.

    AudioSet's classes differ a thousandfold; SSAST draws its clips so.
    """
    counts = np.bincount(np.concatenate(classes), minlength=num_classes)
    chances = np.array([np.sum(1.0 / counts[of_clip]) for of_clip in classes])
    return chances / chances.sum()


def draw_share(classes: Sequence[np.ndarray], percent: float, seed: int) -> np.ndarray:
    """Places of `percent` of the clips, ascending: of every class (its clips' first) that share,
    rounded, one clip at least."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 5))))
    first = np.array([of_clip[0] if len(of_clip) else -1 for of_clip in classes])
    drawn = []
    for number in np.unique(first):
        places = random.permutation(np.flatnonzero(first == number))
        drawn.append(places[: max(1, round(len(places) * percent / 100))])
    return np.sort(np.concatenate(drawn))


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
        return random.permutation(size)
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
        frames = windows.bucket_steps(min(whole, max_frames), max_frames)
    audio = np.zeros((len(clips), fbank.num_samples(frames)), np.int16)
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = clip
    lengths = [max(len(clip), fbank.FRAME_LENGTH) for clip in clips]
    return {"audio": audio, "num_samples": np.array(lengths, np.int32)}


def _ahead(load: Callable[[int], object], steps: range, threads: int) -> Iterator:
    """`load` of each step, in order, a few of them ahead in threads."""
    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        pending = []
        rest = iter(steps)
        try:
            while True:
                for step in rest:
                    pending.append(pool.submit(load, step))
                    if len(pending) >= _BATCHES_AHEAD:
                        break
                if not pending:
                    return
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
