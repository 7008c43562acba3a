"""Which clip stands at position k: several data sets as one shuffled, endless sequence.

Position k is computed without those before it: (epoch, place) = divmod(k, clips), and a permutation
that is a function of (seed, epoch) maps the place to a clip. Every position costs the same, except
the first of an epoch, where the permutation is drawn.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from maeast_jax.data import dataset, demo_corpus, writer
from maeast_jax.runtime import storage

# A weighted mixture repeats a pattern of this many slots, so weights are exact to one in as many.
MIXTURE_SLOTS = 10_000
# This many clips that lie side by side in a shard stay together in the order, so that they are one
# read (2.5 MB, with ten seconds per clip). TFDS shards are in random order, so neighbours are no
# more alike than other clips.
NEIGHBOURS = 8
# Sets of fewer clips (5 GB) stay in a host's memory once read; their clips are shuffled singly.
FEW_CLIPS = 2**14

# What follows a name. A split holds no slash, so that an @ in a path starts none, and commas only
# inside the brackets of a slice.
_REST = re.compile(
    r"\s*(@(?P<split>([^*@/,\[]|\[[^\]]*\])+?))?\s*"
    r"(\*\s*(?P<weight>(\d+\.?\d*|\.\d+)(e-?\d+)?))?\s*"
)


@dataclasses.dataclass(frozen=True)
class Component:
    """One term of a mixture, written as `NAME_OR_DIRECTORY[@SPLIT][*WEIGHT]`."""

    name: str
    split: str
    weight: float | None


@dataclasses.dataclass(frozen=True)
class Clips:
    """One or several data sets as one collection.

    Attributes:
      splits: the data sets.
      weights: share of each set in the training stream; None gives each clip the same share.
    """

    splits: tuple[dataset.Split, ...]
    weights: tuple[float, ...] | None

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits)

    def find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (data set, example in it), int64 each, of clips numbered through all sets."""
        ends = np.cumsum([len(split) for split in self.splits])
        which = np.searchsorted(ends, index, side="right")
        return which, index - np.concatenate([[0], ends])[which]

    def read(self, which: np.ndarray, example: np.ndarray) -> list[dict]:
        """Returns the records of clips by data set and example, in order, as `Split.read` does."""
        records: list[dict] = [{}] * len(which)
        for component in np.unique(which):
            places = np.flatnonzero(which == component)
            # One call per data set, so that neighbours are read together.
            found = self.splits[component].read(example[places])
            for place, record in zip(places, found, strict=True):
                records[place] = record
        return records

    @property
    def identity(self) -> dict[str, dict[str, int | str]]:
        """What a checkpoint notes of each data set, by name and split: see `rebuilt`."""
        return {
            f"{split.name}@{split.split}": {"clips": len(split), "fingerprint": split.fingerprint}
            for split in self.splits
        }

    def describe(self) -> str:
        """Returns the names, sizes and shares of the data sets in one line."""
        terms = [f"{split.name}@{split.split}: {len(split):,} clips" for split in self.splits]
        if self.weights is not None:
            shares = np.asarray(self.weights) / sum(self.weights)
            terms = [f"{term} x {share:.1%}" for term, share in zip(terms, shares, strict=True)]
        return "; ".join(terms)


def count_shared(mine: Clips, others: Clips) -> int:
    """Returns how many clips of `mine` are among `others`: the same records of the same shards."""

    def files(clips: Clips) -> list:
        return [file for split in clips.splits for file in split.records.files]

    overlaps = (
        min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip)
        for a in files(mine)
        for b in files(others)
        if a.filename == b.filename
    )
    return sum(overlap for overlap in overlaps if overlap > 0)


def rebuilt(before: Mapping[str, dict], now: Mapping[str, dict]) -> list[str]:
    """Returns a line for each data set that is in both identities and was built anew in between."""
    return [
        f"data set {name} was built anew since: {before[name]['clips']:,} clips then, "
        f"{now[name]['clips']:,} now"
        for name in now
        if name in before and before[name] != now[name]
    ]


def parse_mixture(text: str, default_split: str) -> list[Component]:
    """Returns the terms of `data.train` or `data.eval`.

    A directory on this machine that exists wins over the syntax: its path may hold `,`, `@` and
    `*`.

    Raises:
      ValueError: a term does not parse, or only some terms have weights.
    """
    components = []
    pieces = re.split(r",(?![^\[]*\])", text)
    while pieces:
        # The most pieces that name a directory are one term, or else one piece is.
        for count in range(len(pieces), 0, -1):
            readings = _readings(",".join(pieces[:count]))
            chosen = [reading for reading in readings if _is_directory(reading[0])]
            if chosen:
                break
        chosen += [reading for reading in readings[::-1] if re.match(r"[^@*][^*]*$", reading[0])]
        name, rest = chosen[0] if chosen else ("", None)
        weight = float(rest["weight"]) if rest and rest["weight"] else None
        if not name or weight == 0.0:
            raise ValueError(
                f"{pieces[0].strip()!r} in {text!r} must read NAME_OR_DIRECTORY[@SPLIT][*WEIGHT],"
                " the weight a number above 0"
            )
        components.append(Component(name, rest["split"] or default_split, weight))
        pieces = pieces[count:]
    if len({component.weight is None for component in components}) > 1:
        raise ValueError(f"{text!r} gives weights to some data sets only; give all or none")
    return components


def _readings(term: str) -> list[tuple[str, re.Match]]:
    """Returns the ways to part a term into a name and the rest, the longest name first."""
    ends = [len(term), *(mark.start() for mark in reversed([*re.finditer("[@*]", term)]))]
    parted = [(term[:end].strip(), _REST.fullmatch(term[end:])) for end in ends]
    return [(name, rest) for name, rest in parted if name and rest]


def _is_directory(name: str) -> bool:
    return not storage.is_remote(name) and os.path.isdir(os.path.expanduser(name))


def open_clips(
    text: str, default_split: str, data_dir: str | None, sample_rate_hz: int | None = None
) -> Clips:
    """Opens the data sets of a mixture; raises DataError or ValueError in one line."""
    components = parse_mixture(text, default_split)
    splits = tuple(
        dataset.open_split(component.name, component.split, data_dir, sample_rate_hz)
        for component in components
    )
    weights = tuple(component.weight for component in components)
    return Clips(splits, None if weights[0] is None else weights)


def open_demo(split: str, data_dir: str | None) -> Clips:
    """Opens the embedded corpus, which is synthesised and written as a data set on first use."""
    try:
        opened = dataset.open_split(demo_corpus.NAME, split, data_dir)
    except dataset.NotPreparedError:
        storage.check_local(data_dir or "")
        print(f"building the embedded corpus {demo_corpus.NAME}: ten seconds, once", flush=True)
        writer.write(
            demo_corpus.NAME,
            data_dir,
            {name: lambda name=name: demo_corpus.examples(name) for name in demo_corpus.SPLITS},
            label_names=demo_corpus.FAMILIES,
            description="Ten families of synthesised sounds, 2.5 s each.",
            wait=True,
        )
        opened = dataset.open_split(demo_corpus.NAME, split, data_dir)
    return Clips((opened,), None)


def address(
    positions: np.ndarray, clips: Clips, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (data set, epoch, example), int64 each, of positions of the training stream.

    Every epoch of a data set, or of the union, holds each of its clips once, in its own order.
    With weights, each run of MIXTURE_SLOTS positions holds every data set in proportion, in
    shuffled order, and the clips of each data set in the order of its epoch.
    """
    sizes = np.array([len(split) for split in clips.splits])
    if clips.weights is None:
        epoch, place = np.divmod(positions, sizes.sum())
        which, example = clips.find(_shuffle(place, seed, 0, epoch, sizes.sum()))
        return which, epoch, example
    slots = _apportion(clips.weights)
    which, rank = np.empty_like(positions), np.empty_like(positions)
    patterns, slot = np.divmod(positions, MIXTURE_SLOTS)
    for pattern in np.unique(patterns):
        here = patterns == pattern
        which[here], before = (column[slot[here]] for column in _pattern(seed, pattern, *slots))
        rank[here] = pattern * slots[which[here]] + before
    epoch, place = np.divmod(rank, sizes[which])
    return which, epoch, _shuffle(place, seed, 2 + which, epoch, sizes[which])


def generator(*key: int) -> np.random.Generator:
    """Returns random numbers that are a function of the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def permutation(random: np.random.Generator, size: int) -> np.ndarray:
    """Returns a random order of range(size); neighbours stay together from FEW_CLIPS on."""
    if size < FEW_CLIPS:
        return random.permutation(size)
    # The cuts are at random places, so that a clip's neighbours change from epoch to epoch.
    starts = np.arange(-random.integers(NEIGHBOURS), size, NEIGHBOURS)
    order = (random.permutation(starts)[:, None] + np.arange(NEIGHBOURS)).ravel()
    return order[(order >= 0) & (order < size)]


@functools.lru_cache(maxsize=2)  # a batch may lie across two patterns
def _pattern(seed: int, number: int, *slots: int) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of a pattern (its data set, how many slots of that set come before)."""
    which = generator(seed, 1, number).permutation(np.repeat(np.arange(len(slots)), slots))
    before = np.empty_like(which)
    for component, count in enumerate(slots):
        before[which == component] = np.arange(count)
    return which, before


def _shuffle(place, seed: int, stream, epoch, size) -> np.ndarray:
    """Maps each place by a permutation of range(size) that depends on (seed, stream, epoch)."""
    shuffled = np.empty_like(place)
    keys = np.stack(np.broadcast_arrays(stream, epoch, size), axis=1)
    for key in np.unique(keys, axis=0):
        here = np.all(keys == key, axis=1)
        stream_, epoch_, size_ = key.tolist()
        shuffled[here] = _orders(seed, stream_, size_)(epoch_)[place[here]]
    return shuffled


@functools.cache
def _orders(seed: int, stream: int, size: int) -> Callable[[int], np.ndarray]:
    """Returns a function from an epoch to its permutation of range(size).

    A permutation of two million clips costs 0.1 s and 16 MB. TensorFlow's keyed shuffle costs
    neither, but with its four rounds half of 100 clips keep their place, and only 256 orders exist.
    """

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
    def order(epoch: int) -> np.ndarray:
        return permutation(generator(seed, stream, epoch), size)

    return order


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """Shares MIXTURE_SLOTS by weight (largest remainder), at least one slot each."""
    shares = np.asarray(weights) / np.sum(weights) * MIXTURE_SLOTS
    slots = np.maximum(np.floor(shares).astype(np.int64), 1)
    rest = MIXTURE_SLOTS - slots.sum()
    slots[np.argsort(slots - shares)[: max(rest, 0)]] += 1
    slots[np.argmax(slots)] -= max(-rest, 0)
    return slots
