"""What a build tells: how many files became clips, which did not and why, and what comes next."""

import collections
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maeast_jax.data import SAMPLE_RATE_HZ, DataError, Example
from maeast_jax.ingest.sources import AudioFile, Listing

# Of each layout its file in configs/, the splits that this names, and in which fields.
_FINETUNE = {
    "audioset": (
        "finetune_audioset20k.py",
        ("train", "test"),
        {"valid": "@test[:5%]", "test": "@test"},
    ),
    "esc50": ("finetune_esc50.py", ("fold1", "fold2", "fold3", "fold4", "fold5"), {}),
    "speech_commands_v1": (
        "finetune_ks1.py",
        ("train", "valid", "test"),
        {"valid": "@valid", "test": "@test"},
    ),
    "speech_commands_v2": (
        "finetune_ks2.py",
        ("train", "valid", "test"),
        {"valid": "@valid", "test": "@test"},
    ),
    "voxceleb1": (
        "finetune_voxceleb1.py",
        ("train", "valid", "test"),
        {"valid": "@valid", "test": "@test"},
    ),
    "iemocap": (
        "finetune_iemocap.py",
        ("session1", "session2", "session3", "session4", "session5"),
        {},
    ),
}

_COUNTERS = ("files", "clips", "samples")
_SKIPPED = ("unreadable", "too_short")


@dataclasses.dataclass
class Tally:
    """What has happened so far to the files of a listing.

    Attributes:
      files, clips, samples: of each split; files that were skipped count as files.
      unreadable, too_short: (id, reason).
    """

    listing: Listing
    files: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    clips: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    samples: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    too_short: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, file: AudioFile, decoded: np.ndarray | str, clips: Sequence[Example]) -> None:
        """Counts a file that was decoded, or not for the reason given, and gave these clips."""
        self.files[file.split] += 1
        self.clips[file.split] += len(clips)
        self.samples[file.split] += sum(len(samples) for _, samples, _ in clips)
        if isinstance(decoded, str):
            self.unreadable.append((file.id, decoded))
        elif not clips:
            seconds = len(decoded) / SAMPLE_RATE_HZ
            self.too_short.append((file.id, f"{seconds:.2f} s, shorter than --min_seconds"))

    def counts(self) -> dict:
        """What has been added, as `json` holds it."""
        return {name: getattr(self, name) for name in _COUNTERS + _SKIPPED}

    def add_counts(self, counts: dict) -> None:
        """Adds the `counts` of another tally, of other files."""
        for name in _COUNTERS:
            getattr(self, name).update(counts[name])
        for name in _SKIPPED:
            getattr(self, name).extend((clip, reason) for clip, reason in counts[name])

    @property
    def hours(self) -> float:
        """Of audio in all splits."""
        return _hours(self.samples.total())

    def write_skipped(self, path: Path) -> None:
        """Lists every clip that the data set goes without: a TSV of `path` and `reason`."""
        missing = [(clip, "not in the folder") for clip, _ in self.listing.missing]
        skipped = sorted(self.unreadable + self.too_short + missing)
        lines = [f"{clip}\t{' '.join(reason.split())}" for clip, reason in skipped]
        path.write_bytes(("\n".join(["path\treason", *lines]) + "\n").encode())

    def check_skipped(self, max_skipped_percent: float, listing: Path) -> None:
        """DataError where too many files are unreadable, once they are in the file `listing`."""
        if len(self.unreadable) <= len(self.listing.files) * max_skipped_percent / 100:
            return
        self.write_skipped(listing)
        name, reason = self.unreadable[0]
        raise DataError(
            f"{len(self.unreadable)} of the first {self.files.total()} files (of"
            f" {len(self.listing.files)}) cannot be read, more than"
            f" --max_skipped_percent={max_skipped_percent:g}, e.g. {name}: {reason}; all are in"
            f" {listing}: mend or remove them, or raise the limit"
        )

    def summary(self, directory: Path) -> str:
        """The table of splits, and what the data set in `directory` goes without."""
        listed = collections.Counter(file.split for file in self.listing.files)
        missing = collections.Counter(split for _, split in self.listing.missing)
        splits = sorted({*listed, *missing})
        rows = [("split", "files", "clips", "hours", "missing")]
        rows += [
            (
                split,
                listed[split],
                self.clips[split],
                f"{_hours(self.samples[split]):.3f}",
                missing[split],
            )
            for split in splits
            if self.clips[split]
        ]
        shown = len(rows[0]) if missing else len(rows[0]) - 1
        lines = ["".join(f"{cell!s:>12}" for cell in row[:shown]) for row in rows]
        lines += [
            f"split {split} is left out: none of its {listed[split]} files gave a clip"
            + (f", and {missing[split]} are missing" if missing[split] else "")
            for split in splits
            if not self.clips[split]
        ]
        if missing:
            num_clips = missing.total() + len(self.listing.files)
            lines.append(
                f"missing {missing.total()} of {num_clips} clips that the lists name"
                f" ({missing.total() / num_clips:.1%}): {directory / 'skipped.tsv'}"
            )
        if self.unreadable or self.too_short:
            lines.append(
                f"skipped {len(self.unreadable)} unreadable files, {len(self.too_short)} too short:"
                f" {directory / 'skipped.tsv'}"
            )
        if names := self.listing.label_names:
            several = ", any number of them a clip" if self.listing.is_multi_label else ""
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            lines.append(f"{len(names)} labels{several}: {shown}")
        return "\n".join(lines)


def next_steps(
    name: str, data_dir: Path, splits: list[str], listing: Listing, layout: str | None
) -> str:
    """What to do with the data set `name` of these splits, which has some example in each."""
    finetune = finetune_command(name, data_dir, splits, layout)
    if layout:  # folds and speakers are nothing to pretrain on
        lines = [f"its splits: {', '.join(splits)}"]
        if finetune:
            lines += ["next, to fine-tune a checkpoint CKPT on it:", f"  {finetune}"]
        return "\n".join(lines)
    lines = ["next:", f"  {pretrain_command(name, data_dir, splits)}"]
    if len(listing.label_names or ()) > 1 or listing.is_multi_label:
        lines += ["or, to fine-tune a checkpoint CKPT on its labels:", f"  {finetune}"]
    return "\n".join(lines)


def pretrain_command(name: str, data_dir: Path, splits: list[str]) -> str:
    """The command that trains on the data set `name` of these splits."""
    return (
        f"python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/{name}"
        f" --config.data.dir={shlex.quote(str(data_dir))} {sources_of(name, splits)}"
    )


def finetune_command(
    name: str, data_dir: Path, splits: list[str], layout: str | None = None
) -> str | None:
    """The command that fine-tunes on a labelled data set.

    None for a layout that lacks a split which its configuration names: there is no such result.
    """
    if layout:
        config, needed, fields = _FINETUNE[layout]
        if not set(needed) <= set(splits):
            return None
        terms = {field: f"{name}{split}" for field, split in fields.items()}
        terms = {} if name == layout else {"train": name, **terms}
    else:
        config = "finetune_folder.py"
        train = "train" if "train" in splits else splits[0]
        terms = {"train": name if train == "train" else f"{name}@{train}"}
        for field, term in (("valid", name), ("test", f"{name}@test")):
            if field in splits and field != train:
                terms[field] = term
    words = [
        f"python -m maeast_jax.finetune --config=configs/{config} --workdir=runs/{name}_labels",
        f"--config.init_from=CKPT --config.data.dir={shlex.quote(str(data_dir))}",
        *(shlex.quote(f"--config.data.{field}={term}") for field, term in terms.items()),
    ]
    return " ".join(words)


def sources_of(name: str, splits: list[str]) -> str:
    """The training flags that name the data set: it may have other splits than they default to."""
    train = "train" if "train" in splits else splits[0]
    flag = f"--config.data.train={name if train == 'train' else f'{name}@{train}'}"
    for split, term in (("valid", name), ("test", f"{name}@test")):
        if split in splits and split != train:
            return f"{flag} --config.data.eval={term}"
    return flag


def _hours(samples: int) -> float:
    return samples / SAMPLE_RATE_HZ / 3600
