"""Labelled clips: opening sets under one numbering of the classes, reading, drawing shares."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import mixture, pipeline
from maeast_jax.data.dataset import DataError
from maeast_jax.data.mixture import Clips


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
        """The clips at `places`, in that order; DataError for a label that is no class."""
        return [
            Clip(
                record["id"],
                pipeline.samples_of(self.clips.splits[component], record["audio"], example),
                self._classes(component, record),
            )
            for component, example, record in self._records(places)
        ]

    def read_classes(self, places: np.ndarray) -> list[np.ndarray]:
        """As `read`, without the work that the samples take."""
        return [self._classes(component, record) for component, _, record in self._records(places)]

    def _records(self, places: np.ndarray) -> list[tuple[int, int, dict]]:
        """(data set, example, record with an id) of each, in order."""
        index = self.index[places]
        ends = np.cumsum([len(split) for split in self.clips.splits])
        which = np.searchsorted(ends, index, side="right")
        example = index - np.concatenate([[0], ends])[which]
        found: list[tuple[int, int, dict] | None] = [None] * len(which)
        for component in np.unique(which):
            split = self.clips.splits[component]
            places = np.flatnonzero(which == component)
            for place, record in zip(places, split.read(example[places]), strict=True):
                name = record["id"] or f"{split.name}@{split.split}#{example[place]}"
                found[place] = component, example[place], record | {"id": name}
        return found

    def _classes(self, component: int, record: dict) -> np.ndarray:
        """The numbers in this numbering; DataError for one that stands for no class."""
        numbers, known = np.atleast_1d(record["label"]), self.renumbering[component]
        if unknown := [int(n) for n in numbers if not 0 <= n < len(known)]:
            # TFDS writes -1 where the class is not known.
            raise DataError(
                f"clip {record['id']!r} of {self.clips.splits[component].name} has the label "
                f"{unknown[0]}, but the classes are 0 to {len(known) - 1}; build the set without "
                "that clip"
            )
        return known[numbers]

    def targets(self, clips: Sequence["Clip"]) -> np.ndarray:
        """float32 [n, classes]: 1 where a clip has a class."""
        return _several_hot([clip.classes for clip in clips], self.num_classes)


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
    return [classes for places in _hundreds(labelled) for classes in labelled.read_classes(places)]


def each(labelled: Labelled) -> Iterator[Clip]:
    """Every clip, in order, read by the hundred."""
    for places in _hundreds(labelled):
        yield from labelled.read(places)


def _hundreds(labelled: Labelled) -> list[np.ndarray]:
    return np.array_split(np.arange(len(labelled)), math.ceil(len(labelled) / 128))


def embedded(
    labelled: Labelled, embed: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(what `embed` makes of every clip [n, size], truth, ids), in order.

    `embed` maps int16 [samples] to vectors; a clip shorter than a frame of 25 ms ends in silence.
    """
    ids: list[str] = []
    classes: list[np.ndarray] = []

    def samples() -> Iterator[np.ndarray]:
        for clip in each(labelled):
            ids.append(clip.id)  # and not the clip, whose samples would all stay in memory
            classes.append(clip.classes)
            missing = max(0, fbank.FRAME_LENGTH - len(clip.samples))
            yield np.pad(clip.samples, (0, missing))

    vectors = np.stack(list(embed(samples())))
    return vectors, truth(labelled, classes), ids


def truth(labelled: Labelled, classes: Sequence[np.ndarray]) -> np.ndarray:
    """What metrics compare with: int labels [n], or float32 [n, classes] of 0 and 1."""
    if not labelled.is_multi_label:
        return np.array([of_clip[0] for of_clip in classes], np.int64)
    return _several_hot(classes, labelled.num_classes)


def _several_hot(classes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    target_NxC = np.zeros((len(classes), num_classes), np.float32)
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


def draw_share(
    classes: Sequence[np.ndarray], percent: float, seed: int, leave: int = 0
) -> np.ndarray:
    """Places of `percent` of the clips, ascending: of every class (its clips' first) that share,
    rounded, one clip at least; but `leave` clips of every class stay, if that is none drawn."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 5))))
    first = np.array([of_clip[0] if len(of_clip) else -1 for of_clip in classes])
    drawn = []
    for number in np.unique(first):
        places = random.permutation(np.flatnonzero(first == number))
        count = max(1, round(len(places) * percent / 100))
        drawn.append(places[: min(count, len(places) - leave)])
    return np.sort(np.concatenate(drawn))
