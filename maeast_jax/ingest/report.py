"""What a build reports: which files became clips, which did not and why, and the next commands."""

import collections
import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from etils import epath

from maeast_jax.data import SAMPLE_RATE_HZ, DataError, Example, Recording, has_sound
from maeast_jax.ingest.sources import AudioFile, Listing

_FINETUNE_CONFIGS = {
    "audioset": "finetune_audioset20k.py",
    "esc50": "finetune_esc50.py",
    "speech_commands_v1": "finetune_ks1.py",
    "speech_commands_v2": "finetune_ks2.py",
    "voxceleb1": "finetune_voxceleb1.py",
    "iemocap": "finetune_iemocap.py",
}


@dataclasses.dataclass
class Tally:
    """Counts of the files that were decoded, and of the clips that they gave.

    Attributes:
      files, clips, samples: counts per split; skipped files count as files.
      unreadable, too_short: (id, reason) of the files that gave no clip.
      remarks: (id, remark) of files that were read in another way than most, whose end was left
        out or that are longer than listed, and of clips without sound. A remark is "KIND: DETAIL",
        or "KIND".
    """

    files: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    clips: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    samples: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    too_short: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    remarks: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, file: AudioFile, decoded: Recording | str, clips: Sequence[Example]) -> None:
        """Counts a file that was decoded (or was not, for the reason given) into these clips."""
        self.files[file.split] += 1
        self.clips[file.split] += len(clips)
        held = sum(len(samples) for _, samples, _ in clips)
        self.samples[file.split] += held
        if isinstance(decoded, str):
            self.unreadable.append((file.id, decoded))
            return
        self.remarks += [(file.id, remark) for remark in decoded.remarks]
        self.remarks += [(clip, "no sound") for clip, samples, _ in clips if not has_sound(samples)]
        seconds = len(decoded.samples) / SAMPLE_RATE_HZ
        left_out = seconds - held / SAMPLE_RATE_HZ
        if not clips:
            self.too_short.append((file.id, f"{seconds:.2f} s, shorter than --min_seconds"))
        elif left_out:
            self.remarks.append((file.id, f"last piece too short: {left_out:.2f} s left out"))
        if seconds > (file.listed_seconds or math.inf) + 1:  # cuts end at packets and frames
            listed = f"{file.listed_seconds:g} of {seconds:.2f} s are its clip"
            self.remarks.append((file.id, f"longer than the list says: {listed}"))

    def merge(self, other: "Tally") -> None:
        """Adds the counts of other files."""
        self.files.update(other.files)
        self.clips.update(other.clips)
        self.samples.update(other.samples)
        self.unreadable += other.unreadable
        self.too_short += other.too_short
        self.remarks += other.remarks

    @property
    def hours(self) -> float:
        """Hours of audio in all splits."""
        return _hours(self.samples.total())


def write_lists(directory: Path | epath.Path, tally: Tally, listing: Listing) -> None:
    """Lists beside a data set the clips that it lacks, and the remarks on those that it holds."""
    _write_skipped(directory / "skipped.tsv", tally, listing)
    _write_tsv(directory / "remarks.tsv", "remark", tally.remarks)


def _write_skipped(path: Path | epath.Path, tally: Tally, listing: Listing) -> None:
    missing = [(clip, "not in the folder") for clip, _ in listing.missing]
    _write_tsv(path, "reason", tally.unreadable + tally.too_short + missing)


def _write_tsv(path: Path | epath.Path, column: str, rows: Iterable[tuple[str, str]]) -> None:
    lines = [f"{clip}\t{' '.join(text.split())}" for clip, text in sorted(rows)]
    path.write_bytes(("\n".join([f"path\t{column}", *lines]) + "\n").encode())


def check_skipped(
    tally: Tally, listing: Listing, max_skipped_percent: float, skipped: Path | epath.Path
) -> None:
    """Raises DataError where too many files are unreadable, after listing them in `skipped`."""
    if len(tally.unreadable) <= len(listing.files) * max_skipped_percent / 100:
        return
    _write_skipped(skipped, tally, listing)
    name, reason = tally.unreadable[0]
    raise DataError(
        f"{len(tally.unreadable)} of the first {tally.files.total()} files (of"
        f" {len(listing.files)}) cannot be read, more than"
        f" --max_skipped_percent={max_skipped_percent:g}, e.g. {name}: {reason}; those so"
        f" far are in {skipped}: mend or remove them, or raise the limit"
    )


def check_split(tally: Tally, split: str) -> None:
    """Raises DataError where none of the files of a split gave a clip."""
    if not tally.clips[split]:
        raise DataError(
            f"split {split!r} has no examples: leave it out, or put clips into it"
            " (--valid_percent=0 makes no split `valid`)"
        )


def summary(tally: Tally, listing: Listing, directory: Path | epath.Path) -> str:
    """Returns the table of splits, what the set in `directory` lacks, and remarks on the rest."""
    missing = collections.Counter(split for _, split in listing.missing)
    rows = [("split", "files", "clips", "hours", "missing")]
    for split in sorted({*tally.files, *missing}):
        hours = f"{_hours(tally.samples[split]):.3f}"
        rows.append((split, tally.files[split], tally.clips[split], hours, missing[split]))
    columns = len(rows[0]) if missing else len(rows[0]) - 1
    lines = ["".join(f"{cell!s:>12}" for cell in row[:columns]) for row in rows]
    skipped = directory / "skipped.tsv"
    if missing:
        num_clips = missing.total() + len(listing.files)
        lines.append(
            f"missing {missing.total()} of {num_clips} clips that the lists name"
            f" ({missing.total() / num_clips:.1%}): {skipped}"
        )
    if tally.unreadable or tally.too_short:
        lines.append(
            f"skipped {len(tally.unreadable)} unreadable files, {len(tally.too_short)} too short:"
            f" {skipped}"
        )
    kinds = collections.defaultdict(list)
    for clip, remark in sorted(tally.remarks):
        kind, _, detail = remark.partition(": ")
        kinds[kind].append(f"{clip}: {detail}" if detail else clip)
    for kind, found in sorted(kinds.items()):
        lines.append(f"{kind}: {len(found)}, e.g. {found[0]}")
    if kinds:
        lines.append(f"the whole list: {directory / 'remarks.tsv'}")
    if names := listing.label_names:
        several = ", any number of them per clip" if listing.is_multi_label else ""
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        lines.append(f"{len(names)} labels{several}: {shown}")
    return "\n".join(lines)


# --- the next commands -----------------------------------------------------------------------


def next_steps(
    name: str, data_dir: Path, splits: list[str], listing: Listing, layout: str | None
) -> str:
    """Returns the next commands for the data set `name`, which has examples in `splits`."""
    if layout:  # folds and speakers are nothing to pretrain on
        lines = [f"its splits: {', '.join(splits)}"]
        if name == layout:  # the configuration opens the data set by this name
            command = _finetune(_FINETUNE_CONFIGS[layout], name, data_dir, {})
            lines += ["next, to fine-tune a checkpoint CKPT on it:", f"  {command}"]
        return "\n".join(lines)
    # `NAME` alone is its split train or, for evaluation, valid.
    train = "train" if "train" in splits else splits[0]
    terms = {"train": name if train == "train" else f"{name}@{train}"}
    for split, term in (("valid", name), ("test", f"{name}@test")):
        if split in splits and split != train:
            terms[split] = term
    evaluation = terms.get("valid", terms.get("test"))
    pretrain = {"train": terms["train"]} | ({"eval": evaluation} if evaluation else {})
    lines = [
        "next:",
        f"  python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/{name}"
        f" {_data_flags(data_dir, pretrain)}",
    ]
    if len(listing.label_names or ()) > 1 or listing.is_multi_label:
        command = _finetune("finetune_folder.py", name, data_dir, terms)
        lines += ["or, to fine-tune a checkpoint CKPT on its labels:", f"  {command}"]
    return "\n".join(lines)


def _finetune(config: str, name: str, data_dir: Path, terms: Mapping[str, str]) -> str:
    return (
        f"python -m maeast_jax.finetune --config=configs/{config} --workdir=runs/{name}_labels"
        f" --config.init_from=CKPT {_data_flags(data_dir, terms)}"
    )


def _data_flags(data_dir: Path, terms: Mapping[str, str]) -> str:
    values = {"dir": str(data_dir), **terms}
    return " ".join(f"--config.data.{key}={shlex.quote(value)}" for key, value in values.items())


def _hours(samples: int) -> float:
    return samples / SAMPLE_RATE_HZ / 3600
