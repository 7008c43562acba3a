"""What a build tells of its files: how many became clips, and which did not and why."""

import collections
import dataclasses
import shlex
from pathlib import Path

from maeast_jax.audio import SAMPLE_RATE_HZ
from maeast_jax.manifest import Listing
from maeast_jax.shard_writer import DataError


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

    @property
    def hours(self) -> float:
        """Of audio in all splits."""
        return _hours(self.samples.total())

    def write_skipped(self, path: Path) -> None:
        """Lists every clip that the data set goes without: a TSV of `path` and `reason`."""
        missing = [(clip, "not in the folder") for clip, _ in self.listing.missing]
        skipped = sorted(self.unreadable + self.too_short + missing)
        lines = [f"{clip}\t{' '.join(reason.split())}" for clip, reason in skipped]
        path.write_text("\n".join(["path\treason", *lines]) + "\n", encoding="utf-8")

    def too_many_skipped(self, max_skipped_percent: float, listing: Path) -> DataError:
        """The error of a build that stops for them, once they are listed in the file `listing`."""
        self.write_skipped(listing)
        name, reason = self.unreadable[0]
        return DataError(
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


def pretrain_command(name: str, data_dir: Path, splits: list[str]) -> str:
    """The command that trains on the data set `name` of these splits."""
    return (
        f"python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/{name}"
        f" --config.data.dir={shlex.quote(str(data_dir))} {sources_of(name, splits)}"
    )


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
