"""Labelled clips: sets opened under one numbering of their classes, read, and drawn in batches.

As in pretraining the stream of batches is addressed by step: (seed, epoch) determines which clips a
step holds. So a resumed run goes on with the same batches and needs no saved iterator.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import audio, mixture, pipeline
from maeast_jax.data.dataset import DataError
from maeast_jax.data.mixture import Clips
from maeast_jax.data.pipeline import Batch

_CLIPS_PER_READ = 128
_FRAME_SECONDS = fbank.FRAME_LENGTH / fbank.SAMPLE_RATE_HZ
# The end of the id of a piece that a build has cut from a longer recording.
_PIECE = re.compile(r"#\d{4,}$")


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A clip: `id`, int16 `samples` at 16 kHz, and the numbers of its classes."""

    id: str
    samples: np.ndarray
    classes: np.ndarray


class Look(NamedTuple):
    """What one reading of a clip tells of it.

    Attributes:
      classes: the numbers of its classes.
      sound: a hash of its samples; None where they hold no sound.
      recording: the name of the recording that it is a piece of.
      seconds: its length.
    """

    classes: np.ndarray
    sound: int | None
    recording: str
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """One or several labelled data sets as one, with one numbering of the classes.

    Attributes:
      text: the mixture that names the sets.
      clips: the sets.
      class_names: the classes in the order of their numbers.
      is_multi_label: whether a clip has any number of classes.
      renumbering: for each set, the class of each of the set's own numbers.
      index: numbers of the clips that belong to this, ascending, counted through all sets.
      known: what was seen of each clip that was looked at, by its number. Subsets share this, so
        that no clip is looked at twice.
    """

    text: str
    clips: Clips
    class_names: tuple[str, ...]
    is_multi_label: bool
    renumbering: tuple[np.ndarray, ...]
    index: np.ndarray
    known: dict[int, Look] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, places: np.ndarray) -> "Labelled":
        """Returns the same with the clips at `places` only."""
        return dataclasses.replace(self, index=np.sort(self.index[places]))

    @property
    def looks(self) -> list[Look]:
        """What every clip is, in order.

        The first use reads every record, 0.2 to 0.4 ms per clip of 5 s on a local disk, without
        converting the samples.

        Raises:
          DataError: a label that is not a class.
        """
        places = np.flatnonzero([number not in self.known for number in self.index])
        for place, (component, _, record) in zip(places, self._records(places), strict=True):
            split, stored = self.clips.splits[component], record["audio"]
            seconds = len(stored) / split.sample_rate_hz
            has_sound = seconds >= _FRAME_SECONDS and audio.has_sound(stored)
            self.known[self.index[place]] = Look(
                self._classes(component, record),
                hash(stored.tobytes()) if has_sound else None,
                f"{split.name}: {_PIECE.sub('', record['id'])}",
                seconds,
            )
        return [self.known[number] for number in self.index]

    @property
    def classes(self) -> list[np.ndarray]:
        """The classes of every clip in order; it costs and raises what `looks` does."""
        return [look.classes for look in self.looks]

    @property
    def longest_seconds(self) -> float:
        """The length of the longest clip; it costs and raises what `looks` does."""
        return max(look.seconds for look in self.looks)

    @property
    def has_sound(self) -> np.ndarray:
        """bool [n]: whether a clip fills a frame of 25 ms and is not the same value throughout."""
        return np.array([look.sound is not None for look in self.looks])

    @property
    def truth(self) -> np.ndarray:
        """The targets of metrics: int labels [n], or float32 [n, classes] of 0 and 1."""
        if self.is_multi_label:
            return _several_hot(self.classes, self.num_classes)
        return np.array([of_clip[0] for of_clip in self.classes], np.int64)

    def count_shared(self, other: "Labelled") -> int:
        """Returns how many clips of this hold the same samples as a clip of `other`."""
        others = {look.sound for look in other.looks} - {None}
        return sum(look.sound in others for look in self.looks)

    def read(self, places: np.ndarray) -> Iterator[Clip]:
        """Yields the clips at `places`, in that order.

        Raises:
          DataError: a label that is not a class, or a clip that is not audio.
        """
        for component, example, record in self._records(places):
            samples = pipeline.samples_of(self.clips.splits[component], record["audio"], example)
            yield Clip(record["id"], samples, self._classes(component, record))

    def _records(self, places: np.ndarray) -> Iterator[tuple[int, int, dict]]:
        """Yields (data set, example, record with an id) of each clip, in order."""
        for start in range(0, len(places), _CLIPS_PER_READ):
            which, example = self.clips.find(self.index[places[start : start + _CLIPS_PER_READ]])
            records = self.clips.read(which, example)
            for component, number, record in zip(which, example, records, strict=True):
                split = self.clips.splits[component]
                name = record["id"] or f"{split.name}@{split.split}#{number}"
                yield component, number, record | {"id": name}

    def _classes(self, component: int, record: dict) -> np.ndarray:
        """Returns the clip's classes in this numbering; raises DataError for an unknown number."""
        numbers, known = np.atleast_1d(record["label"]), self.renumbering[component]
        if unknown := [int(n) for n in numbers if not 0 <= n < len(known)]:
            # TFDS writes -1 for an unknown class.
            raise DataError(
                f"clip {record['id']!r} of {self.clips.splits[component].name} has the label "
                f"{unknown[0]}, but the classes are 0 to {len(known) - 1}; build the set without "
                "that clip"
            )
        return known[numbers]


def open_labelled(
    text: str,
    default_split: str,
    data_dir: str | None,
    *,
    sample_rate_hz: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Labelled:
    """Opens the labelled sets of a mixture without weights under one numbering of the classes.

    Args:
      text: `NAME_OR_DIRECTORY[@SPLIT]`, several with commas between.
      default_split: the split of sets that name none.
      data_dir, sample_rate_hz: as for `dataset.open_split`.
      class_names: the classes of the training set; None takes those of the first set.

    Raises:
      DataError, ValueError: a set is not there or has no labels, there are weights, or a class is
        not among `class_names`.
    """
    clips = mixture.open_clips(text, default_split, data_dir, sample_rate_hz)
    if clips.weights is not None:
        raise ValueError(f"{text!r} has weights, but every labelled clip counts once; drop them")
    for split in clips.splits:
        if split.label_names is None:
            raise DataError(
                f"data set {split.name} has no feature `label` that is a ClassLabel, nor `labels` "
                "that is a Sequence of it; build it with --label_from_folder, or from a manifest "
                "with a column `label`"
            )
    class_names = tuple(class_names or clips.splits[0].label_names)
    kinds = {split.is_multi_label for split in clips.splits}
    if len(kinds) > 1:
        raise DataError(
            f"{text!r} mixes sets with one label per clip and sets with several; name one kind"
        )
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


# --- whole sets -------------------------------------------------------------------------------


def embedded(
    labelled: Labelled, embed: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns (vectors [n, size], truth, ids) of every clip in order.

    Args:
      embed: maps clips int16 [samples] to vectors [size]. A clip shorter than a frame of 25 ms is
        padded to one with silence.
    """
    ids: list[str] = []

    def samples() -> Iterator[np.ndarray]:
        for clip in labelled.read(np.arange(len(labelled))):
            # Not the clip itself: the samples of the whole set would stay in memory.
            ids.append(clip.id)
            missing = max(0, fbank.FRAME_LENGTH - len(clip.samples))
            yield np.pad(clip.samples, (0, missing))

    vectors = np.stack(list(embed(samples())))
    return vectors, labelled.truth, ids


def _several_hot(classes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Returns float32 [n, classes]: 1 where a clip has a class."""
    target_NxC = np.zeros((len(classes), num_classes), np.float32)
    for row, of_clip in zip(target_NxC, classes, strict=True):
        row[of_clip] = 1.0
    return target_NxC


# --- draws ------------------------------------------------------------------------------------


def rarity(classes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Returns float64 [n]: the chance to draw each clip, by the rarity of its classes.

    The chance is in proportion to the sum of 1 / size over the clip's classes. SSAST draws the
    clips of AudioSet so, whose classes differ in size a thousandfold. Clips without a class are a
    class of their own.
    """
    classes = [of_clip if len(of_clip) else np.array([num_classes]) for of_clip in classes]
    counts = np.bincount(np.concatenate(classes))
    chances = np.array([np.sum(1.0 / counts[of_clip]) for of_clip in classes])
    return chances / chances.sum()


def draw_share(looks: Sequence[Look], percent: float, seed: int, leave: int = 0) -> np.ndarray:
    """Returns the places of the clips of a random `percent` of every class, ascending.

    Recordings are drawn whole: pieces of one sound alike, and a model that has learnt some of them
    knows the others. A recording counts for the first class of its first piece. The number per
    class is rounded, at least 1, and leaves at least `leave` recordings of the class undrawn, even
    if none is drawn then.
    """
    random = mixture.generator(seed, 5)
    names = [look.recording for look in looks]
    _, starts, numbers = np.unique(names, return_index=True, return_inverse=True)
    first = np.array([look.classes[0] if len(look.classes) else -1 for look in looks])
    drawn = []
    for number in np.unique(first[starts]):
        of_class = random.permutation(np.sort(starts[first[starts] == number]))
        count = max(1, round(len(of_class) * percent / 100))
        drawn.append(of_class[: min(count, len(of_class) - leave)])
    return np.flatnonzero(np.isin(starts[numbers], np.concatenate(drawn)))


# --- batches ----------------------------------------------------------------------------------


def train_index(
    size: int, batch_size: int, seed: int, chances: np.ndarray | None = None
) -> Callable[[int], np.ndarray]:
    """Returns a function from a step to the places [batch_size] of its clips among `size`.

    Every epoch holds each clip once, in its own order. With `chances` [size] an epoch is as many
    draws with replacement.
    """

    @functools.lru_cache(maxsize=4)  # Threads load several batches, which may lie in two epochs.
    def order(epoch: int) -> np.ndarray:
        random = mixture.generator(seed, 3, epoch)
        if chances is None:
            return mixture.permutation(random, size)
        return random.choice(size, size, p=chances)

    def places(step: int) -> np.ndarray:
        epoch, place = np.divmod(step * batch_size + np.arange(batch_size), size)
        found = np.empty_like(place)
        for number in np.unique(epoch):
            found[epoch == number] = order(int(number))[place[epoch == number]]
        return found

    return places


def train_batches(
    labelled: Labelled,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    total_steps: int,
    num_frames: int,
    max_frames: int,
    least_frames: int = 1,
    chances: np.ndarray | None = None,
    threads: int = 0,
) -> Iterator[Batch]:
    """Yields the batches of steps `start_step` to `total_steps` - 1.

    Args:
      num_frames: length of every clip in the batch: longer clips are cut at a place drawn from
        (seed, step, row), shorter ones padded with silence. With 0 a batch is as long as its
        longest clip, rounded up to one of a few lengths.
      max_frames: the longest batch where `num_frames` is 0.
      least_frames: the shortest one, such as the frames of a token.
      chances: chance to draw each clip; None draws each clip once per epoch.
      threads: as for `pipeline.prefetched`.

    Yields:
      {audio int16 [b, samples], num_samples int32 [b], target float32 [b, classes]}.
    """
    index = train_index(len(labelled), batch_size, seed, chances)
    limit = fbank.num_samples(num_frames or max_frames)

    def load(step: int) -> Batch:
        clips = list(labelled.read(index(step)))
        random = mixture.generator(seed, 4, step)
        cut = []
        for clip in clips:
            start = int(random.integers(max(len(clip.samples) - limit, 0) + 1))
            cut.append(clip.samples[start : start + limit])
        target = _several_hot([clip.classes for clip in clips], labelled.num_classes)
        return pad(cut, num_frames, max_frames, least_frames) | {"target": target}

    fields = _fields(batch_size) | {"target": (np.float32, (batch_size, labelled.num_classes))}
    return pipeline.prefetched(load, range(start_step, total_steps), fields, threads)


def eval_batches(
    labelled: Labelled,
    *,
    batch_size: int,
    num_frames: int,
    max_frames: int,
    least_frames: int = 1,
    threads: int = 0,
) -> Iterator[tuple[Batch, list[Clip]]]:
    """Yields every clip once, in the sets' order, as (batch, clips in the batch).

    The batches are those of training without `target`; clips that are too long keep their middle.
    All batches are full: rows past the last clip are silence, and no clip stands for them.
    """
    limit = fbank.num_samples(num_frames or max_frames)
    clips_of: dict[int, list[Clip]] = {}  # tf.data carries only the arrays of a batch

    def load(step: int) -> Batch:
        first = step * batch_size
        clips = list(labelled.read(np.arange(first, min(first + batch_size, len(labelled)))))
        cut = []
        for clip in clips:
            start = max(len(clip.samples) - limit, 0) // 2
            cut.append(clip.samples[start : start + limit])
        cut += [np.zeros(1, np.int16)] * (batch_size - len(clips))
        clips_of[step] = clips
        return pad(cut, num_frames, max_frames, least_frames)

    steps = range(math.ceil(len(labelled) / batch_size))
    batches = pipeline.prefetched(load, steps, _fields(batch_size), threads)
    for step, batch in zip(steps, batches, strict=True):
        yield batch, clips_of.pop(step)


def pad(clips: Sequence[np.ndarray], num_frames: int, max_frames: int, least_frames: int) -> Batch:
    """Returns {audio int16 [b, samples], num_samples int32 [b]}: the clips padded with silence.

    With `num_frames` clips are padded to that length, with 0 to the first of at most nine lengths
    that holds them all, or to `least_frames`. `num_samples` is the own length of a clip, at least a
    frame (400). It masks the padding, which SSAST treats as part of the clip.
    """
    longest = max(len(clip) for clip in clips)
    frames = num_frames
    if not frames:
        whole = math.ceil(max(longest - fbank.FRAME_LENGTH, 0) / fbank.FRAME_SHIFT) + 1
        frames = max(pipeline.bucket_steps(min(whole, max_frames), max_frames), least_frames)
    audio = np.zeros((len(clips), fbank.num_samples(frames)), np.int16)
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = clip
    lengths = [max(len(clip), fbank.FRAME_LENGTH) for clip in clips]
    return {"audio": audio, "num_samples": np.array(lengths, np.int32)}


def _fields(batch_size: int) -> dict[str, tuple[type, tuple[int | None, ...]]]:
    return {"audio": (np.int16, (batch_size, None)), "num_samples": (np.int32, (batch_size,))}
