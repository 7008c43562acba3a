"""Turns audio files into a TFDS data set of 16 kHz mono 16-bit clips in array_record shards.

  python -m maeast_jax.build_dataset --audio_dir=DIR --data_dir=DATA --name=NAME
  python -m maeast_jax.build_dataset --layout=esc50 --audio_dir=ESC-50-master --data_dir=DATA \\
      --name=esc50

--layout takes a data set as its authors publish it, with its classes and splits: audioset, esc50,
speech_commands_v1 (12 classes; --test_dir), speech_commands_v2 (35 words), voxceleb1, iemocap;
layouts.py says of each what has to lie in the folder. Its clips stay whole.

A file that no decoder reads is skipped, and a clip that a layout's lists name may be missing: both
are counted, and listed in skipped.tsv in the data set's folder.
An interrupted build leaves nothing that opens: run it again.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from maeast_jax import audio, layouts, program, shard_writer
from maeast_jax.build_report import Tally, pretrain_command
from maeast_jax.decode_pool import DecodePool, num_cores
from maeast_jax.manifest import (
    AudioFile,
    Listing,
    ManifestError,
    assign_splits,
    list_folder,
    read_manifest,
)

_PIECE_SECONDS = 30.0
_SHORTEST_TAIL_SECONDS = 1.0


def build(
    *,
    data_dir: str | Path,
    name: str,
    audio_dir: str | Path | None = None,
    manifest: str | Path | None = None,
    layout: str | None = None,
    test_dir: str | Path | None = None,
    label_from_folder: bool = False,
    valid_percent: float = 5.0,
    piece_seconds: float | None = None,
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
    _check_source(audio_dir, manifest, layout, test_dir, label_from_folder)
    _check_percents(valid_percent, max_skipped_percent)
    if piece_seconds is None:
        # What is labelled for a task is scored a clip, not a piece.
        piece_seconds = 0.0 if layout else _PIECE_SECONDS
    _check_lengths(piece_seconds, min_seconds, num_processes)
    data_dir = shard_writer.resolve_data_dir(data_dir)
    if layout:
        listing = layouts.list_layout(layout, audio_dir, test_dir)
    elif manifest:
        listing = Listing.of(read_manifest(manifest, audio_dir))
    else:
        listing = Listing.of(list_folder(audio_dir, label_from_folder))
    # Nobody asked for the very files that are held out, so a few bad ones must not fail the build.
    may_be_empty = ["valid"] if listing.files[0].split is None else []
    files = assign_splits(listing.files, valid_percent)
    listing = dataclasses.replace(listing, files=files)
    by_split = {
        split: [file for file in files if file.split == split]
        for split in sorted({file.split for file in files})
    }
    shard_writer.check_writable(name, data_dir, list(by_split), overwrite)
    num_processes = min(num_processes or num_cores(), len(files))
    source = manifest or audio_dir
    print(f"{len(files)} files from {source} to {data_dir / name}, {num_processes} processes")
    if listing.missing:
        print(f"not in the folder: {len(listing.missing)} more that the lists name")
    sys.stdout.flush()  # ahead of the progress bar, also in a pipe
    tally = Tally(listing)
    skipped = data_dir / f"{name}.skipped.tsv"
    allowed = len(files) * max_skipped_percent / 100
    skipped.unlink(missing_ok=True)
    with DecodePool(num_processes) as pool, tqdm(total=len(files), unit="file") as bar:

        def examples(split: str) -> Iterator[shard_writer.Example]:
            paths = [file.path for file in by_split[split]]
            for file, samples in zip(by_split[split], pool.decode(paths), strict=True):
                tally.files[split] += 1
                if isinstance(samples, str):
                    tally.unreadable.append((file.id, samples))
                else:
                    yield from _clips(file, samples, piece_seconds, min_seconds, tally)
                if len(tally.unreadable) > allowed:
                    raise tally.too_many_skipped(max_skipped_percent, skipped)
                bar.set_postfix_str(f"{tally.hours:.2f} h", refresh=False)
                bar.update()

        directory = shard_writer.write(
            name,
            data_dir,
            {split: functools.partial(examples, split) for split in by_split},
            label_names=listing.label_names,
            multi_label=listing.is_multi_label,
            description=f"{len(files)} audio files, built by maeast_jax.build_dataset.",
            finish=lambda staged: tally.write_skipped(staged / "skipped.tsv"),
            overwrite=overwrite,
            may_be_empty=may_be_empty,
        )
    splits = [split for split in by_split if tally.clips[split]]
    print(f"{tally.summary(directory)}\nbuilt {directory}; ", end="")
    # Folds and speakers are nothing to pretrain on.
    print(
        f"its splits: {', '.join(splits)}"
        if layout
        else f"next:\n  {pretrain_command(name, data_dir, splits)}",
        flush=True,
    )
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
    file: AudioFile, samples: np.ndarray, piece_seconds: float, min_seconds: float, tally: Tally
) -> Iterator[shard_writer.Example]:
    """The examples of a file; ids of pieces end in their number."""
    if file.piece_seconds is not None:
        piece_seconds = file.piece_seconds
    pieces = cut_pieces(
        samples,
        piece_samples=round(piece_seconds * audio.SAMPLE_RATE_HZ),
        min_samples=round(min_seconds * audio.SAMPLE_RATE_HZ),
    )
    if not pieces:
        seconds = len(samples) / audio.SAMPLE_RATE_HZ
        tally.too_short.append((file.id, f"{seconds:.2f} s, shorter than --min_seconds"))
    whole = len(pieces) == 1 and len(pieces[0]) == len(samples)
    for index, piece in enumerate(pieces):
        tally.clips[file.split] += 1
        tally.samples[file.split] += len(piece)
        yield file.id if whole else f"{file.id}#{index:04d}", piece, file.label


# --- command line ----------------------------------------------------------------------------


def _check_source(audio_dir, manifest, layout, test_dir, label_from_folder):
    if not audio_dir and not manifest:
        raise ManifestError("no source: pass --audio_dir=DIR, --manifest=FILE.tsv or both")
    if manifest and label_from_folder:
        raise ManifestError(
            "--label_from_folder goes with --audio_dir alone: in a manifest, labels are its column"
            " `label`"
        )
    if layout and (manifest or label_from_folder):
        raise ManifestError(
            f"--layout={layout} goes with --audio_dir alone: it has lists and labels of its own"
        )
    if test_dir and not layout:
        raise ManifestError("--test_dir goes with --layout=speech_commands_v1 alone: drop it")


def _check_percents(valid_percent, max_skipped_percent):
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


def _define_flags() -> None:
    flags.DEFINE_string("audio_dir", None, "Folder with audio files, at any depth.")
    flags.DEFINE_string(
        "manifest",
        None,
        "TSV with a column `path` (and, where there are, `split` and `label`, or `labels` with `;`"
        " between them), or fairseq's format."
        " Relative paths start at --audio_dir where given, else at the manifest's folder.",
    )
    flags.DEFINE_enum(
        "layout", None, list(layouts.LAYOUTS), "The data set that --audio_dir is, as published."
    )
    flags.DEFINE_string("test_dir", None, "Of speech_commands_v1: its separate test archive.")
    flags.DEFINE_string("data_dir", None, "Where data sets are kept; this one goes to a subfolder.")
    flags.DEFINE_string("name", None, "The data set's name, lower snake case.")
    flags.DEFINE_bool("label_from_folder", False, "A file's label is the name of its folder.")
    flags.DEFINE_float(
        "valid_percent",
        5.0,
        "Share of files in split `valid`, by a hash of the path; splits of a manifest or layout"
        " win.",
    )
    flags.DEFINE_float(
        "piece_seconds",
        None,
        f"Longer files are cut into pieces; 0: never. Default: {_PIECE_SECONDS:g}; of a layout, 0.",
    )
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
