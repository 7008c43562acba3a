"""Turns audio files into a TFDS data set of 16 kHz mono 16-bit clips in array_record shards.

  python -m maeast_jax.build_dataset --audio_dir=DIR --data_dir=DATA --name=NAME

A file that no decoder reads is skipped, counted and listed in skipped.tsv in the data set's folder.
An interrupted build leaves nothing that opens: run it again.
"""

import collections
import dataclasses
import functools
import inspect
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from maeast_jax import audio, program, shard_writer
from maeast_jax.decode_pool import DecodePool, num_cores
from maeast_jax.manifest import AudioFile, ManifestError, assign_splits, list_folder, read_manifest
from maeast_jax.shard_writer import DataError

_SHORTEST_TAIL_SECONDS = 1.0


@dataclasses.dataclass
class _Tally:
    """What has happened to the files so far."""

    files: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    clips: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    samples: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # id, reason
    too_short: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return sorted(self.unreadable + self.too_short)


def build(
    *,
    data_dir: str | Path,
    name: str,
    audio_dir: str | Path | None = None,
    manifest: str | Path | None = None,
    label_from_folder: bool = False,
    valid_percent: float = 5.0,
    piece_seconds: float = 30.0,
    min_seconds: float = 0.0,
    num_processes: int | None = None,
    max_skipped_percent: float = 5.0,
    overwrite: bool = False,
) -> Path:
    """Builds the data set `data_dir/name`; the arguments are the program's flags.

    Decodes in `num_processes` other processes (None: one a core). The data set is the same for any
    number of them.

    Returns:
      The directory of the data set's version.

    Raises:
      ManifestError, DataError, DecoderDiedError, OSError: and nothing was written, but the listing
        of skipped files where these are too many.
    """
    _check_flags(audio_dir, manifest, label_from_folder, valid_percent, max_skipped_percent)
    _check_lengths(piece_seconds, min_seconds, num_processes)
    data_dir = shard_writer.resolve_data_dir(data_dir)
    if manifest:
        files = read_manifest(manifest, audio_dir)
    else:
        files = list_folder(audio_dir, label_from_folder)
    # Nobody asked for the very files that are held out, so a few bad ones must not fail the build.
    may_be_empty = ["valid"] if files[0].split is None else []
    files = assign_splits(files, valid_percent)
    by_split = {
        split: [file for file in files if file.split == split]
        for split in sorted({file.split for file in files})
    }
    shard_writer.check_writable(name, data_dir, list(by_split), overwrite)
    num_processes = min(num_processes or num_cores(), len(files))
    source = manifest or audio_dir
    print(f"{len(files)} files from {source} to {data_dir / name}, {num_processes} processes")
    sys.stdout.flush()  # ahead of the progress bar, also in a pipe
    label_names = sorted({file.label for file in files} - {None}) or None
    cut = functools.partial(
        cut_pieces,
        piece_samples=round(piece_seconds * audio.SAMPLE_RATE_HZ),
        min_samples=round(min_seconds * audio.SAMPLE_RATE_HZ),
    )
    tally = _Tally()
    listing = data_dir / f"{name}.skipped.tsv"
    allowed = len(files) * max_skipped_percent / 100
    listing.unlink(missing_ok=True)
    with DecodePool(num_processes) as pool, tqdm(total=len(files), unit="file") as bar:

        def examples(split: str) -> Iterator[tuple[str, np.ndarray, str | None]]:
            paths = [file.path for file in by_split[split]]
            for file, samples in zip(by_split[split], pool.decode(paths), strict=True):
                tally.files[split] += 1
                if isinstance(samples, str):
                    tally.unreadable.append((file.id, samples))
                else:
                    yield from _clips(file, cut(samples), len(samples), tally)
                if len(tally.unreadable) > allowed:
                    raise _too_many_skipped(tally, len(files), max_skipped_percent, listing)
                bar.set_postfix_str(f"{_hours(tally.samples.total()):.2f} h", refresh=False)
                bar.update()

        directory = shard_writer.write(
            name,
            data_dir,
            {split: functools.partial(examples, split) for split in by_split},
            label_names=label_names,
            description=f"{len(files)} audio files, built by maeast_jax.build_dataset.",
            finish=lambda staged: _write_skipped(staged / "skipped.tsv", tally.skipped),
            overwrite=overwrite,
            may_be_empty=may_be_empty,
        )
    print(_summary(tally, by_split, label_names, directory, data_dir, name), flush=True)
    return directory


def cut_pieces(samples: np.ndarray, piece_samples: int, min_samples: int) -> list[np.ndarray]:
    """Cuts [samples] into pieces of `piece_samples` (0: one piece), the last one shorter.

    A last piece under a second (or `min_samples`) is dropped, unless it is the only one, and one
    piece shorter than `min_samples` gives none.
    """
    if not piece_samples or len(samples) <= piece_samples:
        return [samples] if len(samples) >= min_samples else []
    shortest = max(min_samples, round(_SHORTEST_TAIL_SECONDS * audio.SAMPLE_RATE_HZ))
    starts = range(0, len(samples), piece_samples)
    pieces = [samples[start : start + piece_samples] for start in starts]
    return pieces if len(pieces[-1]) >= shortest else pieces[:-1]


def _clips(
    file: AudioFile, pieces: list[np.ndarray], num_samples: int, tally: _Tally
) -> Iterator[tuple[str, np.ndarray, str | None]]:
    """The examples of a file of `num_samples`; ids of pieces end in their number."""
    if not pieces:
        seconds = num_samples / audio.SAMPLE_RATE_HZ
        tally.too_short.append((file.id, f"{seconds:.2f} s, shorter than --min_seconds"))
    whole = len(pieces) == 1 and len(pieces[0]) == num_samples
    for index, piece in enumerate(pieces):
        tally.clips[file.split] += 1
        tally.samples[file.split] += len(piece)
        yield file.id if whole else f"{file.id}#{index:04d}", piece, file.label


# --- what is told ----------------------------------------------------------------------------


def _check_flags(audio_dir, manifest, label_from_folder, valid_percent, max_skipped_percent):
    if not audio_dir and not manifest:
        raise ManifestError("no source: pass --audio_dir=DIR, --manifest=FILE.tsv or both")
    if manifest and label_from_folder:
        raise ManifestError(
            "--label_from_folder goes with --audio_dir alone: in a manifest, labels are its column"
            " `label`"
        )
    if not 0 <= valid_percent < 100:
        raise ManifestError(f"--valid_percent={valid_percent:g}, expected 0 or more, under 100")
    if not 0 <= max_skipped_percent <= 100:
        raise ManifestError(f"--max_skipped_percent={max_skipped_percent:g}, expected 0 to 100")


def _check_lengths(piece_seconds, min_seconds, num_processes):
    if piece_seconds and not piece_seconds >= _SHORTEST_TAIL_SECONDS:
        raise ManifestError(
            f"--piece_seconds={piece_seconds:g}, expected 0 (never cut) or at least"
            f" {_SHORTEST_TAIL_SECONDS:g}"
        )
    if not min_seconds >= 0 or (piece_seconds and min_seconds > piece_seconds):
        raise ManifestError(
            f"--min_seconds={min_seconds:g}, expected 0 to --piece_seconds ({piece_seconds:g})"
        )
    if num_processes is not None and num_processes < 1:
        raise ManifestError(f"--num_processes={num_processes}, expected at least 1")


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    lines = ["path\treason", *(f"{name}\t{' '.join(reason.split())}" for name, reason in skipped)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _too_many_skipped(
    tally: _Tally, num_files: int, max_skipped_percent: float, listing: Path
) -> DataError:
    _write_skipped(listing, tally.skipped)
    name, reason = tally.unreadable[0]
    return DataError(
        f"{len(tally.unreadable)} of the first {tally.files.total()} files (of {num_files}) cannot"
        f" be read, more than --max_skipped_percent={max_skipped_percent:g}, e.g. {name}: {reason};"
        f" all are in {listing}: mend or remove them, or raise the limit"
    )


def _hours(samples: int) -> float:
    return samples / audio.SAMPLE_RATE_HZ / 3600


def _summary(tally, by_split, label_names, directory, data_dir, name) -> str:
    rows = [("split", "files", "clips", "hours")]
    rows += [
        (split, len(files), tally.clips[split], f"{_hours(tally.samples[split]):.3f}")
        for split, files in by_split.items()
        if tally.clips[split]
    ]
    lines = ["".join(f"{cell!s:>12}" for cell in row) for row in rows]
    lines += [
        f"split {split} is left out: none of its {len(files)} files gave a clip"
        for split, files in by_split.items()
        if not tally.clips[split]
    ]
    if tally.skipped:
        lines.append(
            f"skipped {len(tally.unreadable)} unreadable files, {len(tally.too_short)} too short:"
            f" {directory / 'skipped.tsv'}"
        )
    if label_names:
        shown = ", ".join(label_names[:12]) + (", ..." if len(label_names) > 12 else "")
        lines.append(f"{len(label_names)} labels: {shown}")
    lines.append(
        f"built {directory}; next:\n  python -m maeast_jax.train --config=configs/pretrain_small.py"
        f" --workdir=runs/{name} --config.data.dir={shlex.quote(str(data_dir))}"
        f" {sources_of(name, [split for split in by_split if tally.clips[split]])}"
    )
    return "\n".join(lines)


def sources_of(name: str, splits: list[str]) -> str:
    """The training flags that name the data set: it may have other splits than they default to."""
    train = "train" if "train" in splits else splits[0]
    flag = f"--config.data.train={name if train == 'train' else f'{name}@{train}'}"
    for split, term in (("valid", name), ("test", f"{name}@test")):
        if split in splits and split != train:
            return f"{flag} --config.data.eval={term}"
    return flag


# --- command line ----------------------------------------------------------------------------


def _define_flags() -> None:
    flags.DEFINE_string("audio_dir", None, "Folder with audio files, at any depth.")
    flags.DEFINE_string(
        "manifest",
        None,
        "TSV with a column `path` (and `label`, `split` where there are), or fairseq's format."
        " Relative paths start at --audio_dir where given, else at the manifest's folder.",
    )
    flags.DEFINE_string("data_dir", None, "Where data sets are kept; this one goes to a subfolder.")
    flags.DEFINE_string("name", None, "The data set's name, lower snake case.")
    flags.DEFINE_bool("label_from_folder", False, "A file's label is the name of its folder.")
    flags.DEFINE_float(
        "valid_percent",
        5.0,
        "Share of files in split `valid`, by a hash of the path; a manifest's column `split` wins.",
    )
    flags.DEFINE_float("piece_seconds", 30.0, "Longer files are cut into pieces; 0: never.")
    flags.DEFINE_float("min_seconds", 0.0, "Shorter clips are left out.")
    flags.DEFINE_integer("num_processes", None, "Processes that decode. Default: one a core.")
    flags.DEFINE_float("max_skipped_percent", 5.0, "The build fails past this share of bad files.")
    flags.DEFINE_bool("overwrite", False, "Replace the data set of that name, once built.")


def main(arguments: list[str]) -> None:
    if arguments:
        raise ManifestError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    build(**{name: flags.FLAGS[name].value for name in inspect.signature(build).parameters})


if __name__ == "__main__":
    _define_flags()
    program.run_flags(main, required=("data_dir", "name"))
